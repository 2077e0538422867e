"""README.md and the guide: their code runs, their commands exist, and the README's figures are those of the results."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from mtp_ext.cli.main import main
from mtp_ext.cli.train import parse
from tests.support import forked

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
GUIDES = {path.name: path.read_text() for path in sorted((ROOT / "docs" / "guide").glob("*.md"))}
TEXTS = {"README.md": README, **GUIDES}


def fenced(text: str) -> list[tuple[str, str]]:
    """The language and the content of every fenced block."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


BLOCKS = [
    pytest.param(code, id=f"{name}-{number}")
    for name, text in TEXTS.items()
    for number, code in enumerate(code for language, code in fenced(text) if language == "python")
]
COMMANDS = sorted({line for text in TEXTS.values() for line in re.findall(r"^\$ mtp (.*?)(?:\s+#.*)?$", text, re.M)})


def test_readme_has_code_for_the_loss_and_the_model() -> None:
    assert "mtp_ext.multi_token_cross_entropy(" in README and "MTPModel(" in README


@pytest.mark.slow
@pytest.mark.parametrize("code", BLOCKS)
def test_python_blocks_run(code: str, tmp_path: Path) -> None:
    if "transformers" in code:
        pytest.importorskip("transformers")
    forked.run_code(code, tmp_path)


def output_of(arguments: list[str]) -> tuple[int, str]:
    """The exit code of a command, and what it prints."""
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        try:
            code = main(arguments)
        except SystemExit as ending:
            code = int(ending.code or 0)
    return code, shown.getvalue()


@functools.cache
def help_of(*command: str) -> str:
    code, shown = forked.call(output_of, [*command, "--help"])
    assert code == 0, shown
    return shown


@pytest.mark.slow
@pytest.mark.parametrize("line", COMMANDS)
def test_commands_exist(line: str) -> None:
    command, *arguments = shlex.split(line)
    options = [word for word in arguments if word.startswith("--")]
    if command == "train" and "--config" not in options:
        parse(arguments)
    subcommand = arguments[:1] if command == "bench" else []
    for option in options:
        assert re.search(rf"{re.escape(option)}\b", help_of(command, *subcommand)), f"mtp {command} has no {option}"


def results(name: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    document = json.loads((ROOT / "benchmarks" / "results" / f"{name}_cpu.json").read_text())
    return document["env"], document["rows"]


def cost(row: dict[str, Any]) -> str:
    return f"{row['peak_extra_bytes'] / 2**20:,.0f} MiB and {row['ms_median'] / 1e3:.1f} s"


def sizes(row: dict[str, Any], names: str) -> str:
    return ", ".join(f"{name} = {row[name]:,}" for name in names)


def figures() -> list[str]:
    """Every figure of the README's text, with the words around it, from the committed results."""
    env, steps = results("step_memory")
    step = {row["impl"]: row for row in steps if row["n"] == 4}
    env_of_losses, losses = results("linear_cross_entropy")
    same = all(env[key] == env_of_losses[key] for key in ("cpu", "cores", "threads", "torch"))
    where = "the same machine" if same else "another machine"
    loss = {row["impl"]: row for row in losses if row["dtype"] == "float32" and row["N"] == 4096}
    _, points = results("loss_sweep")
    faster = {(row["N"], row["D"], row["V"]): row.get("baseline_ratio") for row in points if row["impl"] == "mtp_ext"}
    ratios = {shape: ratio for shape, ratio in faster.items() if ratio}
    at_256 = [ratio for (_, _, vocab), ratio in ratios.items() if vocab == 256]
    _, small = results("before_after_faults")
    row = next(row for row in small if row["case"].startswith("loss, N = 1,"))
    _, demo = results("decode_demo")
    drafted = next(r for r in demo if (r["model"], r["text"], r["heads"]) == ("bytes", "torch.nn", 8))
    _, rounds = results("decode_rounds")
    kept = {
        row["batch"]: f"{row['speed_per_token']:.2f}"
        for row in rounds
        if (row["variant"], row["n_layers"], row["dtype"], row["n_draft"]) == ("parallel", 28, "float32", 3)
    }
    return [
        f"emits {drafted['tokens_per_forward']['value']:.2f} bytes per forward",
        f"{drafted['speed']:.2f} times as fast as one byte at a time",
        f"trained for {drafted['seconds'] / 60:.0f} minutes",
        f"keeps {kept[1]} of the speed of one without under 24 trunk layers, and {kept[8]} with 8 prompts",
        f"one row takes {row['after_ratio']:.1f} times as long as there, {row['after_ms']:.2f} ms",
        f"n = 4 heads takes {cost(step['sequential'])}, against {cost(step['autograd'])} with plain torch",
        sizes(step["sequential"], "BSDV"),
        f"float32, {env['cpu']}, {env['threads']} threads",
        f"takes {cost(loss['mtp_ext'])}, against {cost(loss['eager'])} with eager torch",
        f"N = {loss['mtp_ext']['N']:,} rows, {sizes(loss['mtp_ext'], 'DV')}, float32, {where}",
        f"At V = 256 the loss is {min(at_256):.2f} to {max(at_256):.2f} times as fast as eager torch",
        f"over all measured sizes {min(ratios.values()):.2f} to {max(ratios.values()):.2f} times",
    ]


def prose_of(text: str) -> str:
    """A text without its fenced blocks, on one line."""
    return " ".join(re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE).split())


def differences(prose: str) -> list[str]:
    """What a text says otherwise than the results: absent figures, and quantities that no result has."""
    found = []
    for figure in figures():
        if figure not in prose:
            found.append(f"absent: {figure}")
        prose = prose.replace(figure, "")
    return found + re.findall(r"\d[\d.,]*\s?(?:[kMG]i?B|ms|s|x|%|times|GFLOP/s|tokens per second)(?!\w)", prose)


def test_figures_are_those_of_the_results() -> None:
    assert differences(prose_of(README)) == []


@pytest.mark.parametrize("figure", figures())
def test_a_changed_figure_is_found(figure: str) -> None:
    number = re.findall(r"\d+", figure)[-1]
    changed = re.sub(rf"{number}(?!.*{number})", f"{int(number) + 1}", figure)
    assert differences(prose_of(README).replace(figure, changed)) != []


def test_a_figure_without_a_result_is_found() -> None:
    assert differences(prose_of(README) + " A GPU takes 3.5 ms.") == ["3.5 ms"]


def test_figures_are_those_of_the_performance_page() -> None:
    page = (ROOT / "docs" / "results" / "performance.md").read_text()
    _, steps = results("step_memory")
    for row in steps:
        assert f"| {row['n']} | {row['impl']} | {row['ms_median']} | {row['peak_extra_bytes'] / 2**20:.0f} |" in page


def test_the_sample_of_a_run_is_that_of_the_guide() -> None:
    (sample,) = (content for language, content in fenced(README) if not language)
    whole = GUIDES["train.md"].splitlines()
    assert [line for line in sample.splitlines() if line not in whole] == []
