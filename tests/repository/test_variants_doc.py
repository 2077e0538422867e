"""The code in docs/guide/models.md runs, its commands exist, and its table is that of the code."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from mtp_ext.cli.train import parse
from mtp_ext.nn.variants import VARIANTS

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "guide" / "models.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("code", BLOCKS, ids=range(len(BLOCKS)))
def test_python_blocks_run(code: str, tmp_path: Path) -> None:
    if "transformers" in code:
        pytest.importorskip("transformers")
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=120)


def test_commands_are_understood() -> None:
    lines = re.findall(r"^\$ mtp train (.*)$", TEXT, re.MULTILINE)
    assert len(lines) == 5
    for line in lines:
        parse(shlex.split(line))


def test_every_variant_is_in_the_table() -> None:
    assert re.findall(r"^\| `(\w+)` \|", TEXT, re.MULTILINE) == list(VARIANTS)
