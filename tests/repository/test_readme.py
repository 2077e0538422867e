"""The code in README.md runs, and the commands and files that it names exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)


def test_readme_has_code_for_the_op_and_the_model() -> None:
    assert len(BLOCKS) >= 2


@pytest.mark.parametrize("code", BLOCKS, ids=lambda code: code.split("\n", 1)[0])
def test_python_blocks_run(code: str, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=120)


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)]+)\)", TEXT):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_commands_exist() -> None:
    """Every `mtp COMMAND --options` in the README is one that the command line knows."""
    lines = re.findall(r"^\$ mtp (.*?)(?:\s{2,}#.*)?$", TEXT, re.MULTILINE)
    assert lines
    for line in lines:
        command, *rest = line.split()
        shown = subprocess.run(
            [sys.executable, "-m", "mtp_ext", command, "--help"], capture_output=True, text=True, timeout=120
        )
        assert shown.returncode == 0, shown.stderr
        for option in (word for word in rest if word.startswith("--")):
            assert option in shown.stdout, f"mtp {command} has no {option}"
