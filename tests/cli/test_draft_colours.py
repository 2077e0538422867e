"""Colours of drafts: which token gets which, on terminals only; and the line of statistics."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mtp_ext.cli.draft_colours import COLOURS, Painter, RoundWriter
from mtp_ext.cli.main import main
from mtp_ext.generate import DecodingStats, GenerationOutput, generate
from mtp_ext.train.checkpoint.saved_model import load_saved_model
from tests.generate.test_self_speculation import counting
from tests.train.tiny import run, tiny_config

ESCAPE = re.compile(r"\x1b\[[\d;]*m")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("colours")
    run(tiny_config(root, max_steps=30))
    return root / "run"


def positions_of(
    n_new: int, eos_token: int | None = None, n_draft: int = 3
) -> tuple[list[int], list[int], DecodingStats]:
    """Tokens and positions of heads that know what comes: 1 2 3 ... modulo 8 after 0."""
    found: list[tuple[int, int]] = []
    writer = RoundWriter(
        lambda token, position: found.append((token, position)), n_new, -1 if eos_token is None else eos_token
    )
    stats = generate(
        counting(4),
        torch.tensor([[0]]),
        n_new,
        n_draft=n_draft,
        eos_token=eos_token,
        on_tokens=lambda row, tokens: writer.add(tokens),
    ).stats
    writer.close(stats)
    return [token for token, _ in found], [position for _, position in found], stats


@pytest.mark.parametrize(("accepted", "last"), [(2, [1, 2]), (3, [1, 2]), (1, [1, 0])])
def test_a_round_that_is_cut_ends_with_a_draft(accepted: int, last: list[int]) -> None:
    """Seven tokens: of the last round two fit, whatever it accepted beyond them."""
    found: list[int] = []
    writer = RoundWriter(lambda token, position: found.append(position), 7, 99)
    for tokens in ([5], [6, 7, 8, 9], [1, 2]):
        writer.add(tokens)
    assert found == [0, 1, 2, 3, 0]  # the last round waits
    histogram = [0, 0, 0, 1]
    histogram[accepted] += 1
    writer.close(DecodingStats(3, 7, 6, tuple(histogram), 1))
    assert found == [0, 1, 2, 3, 0, *last]


@pytest.mark.parametrize("n_new", range(1, 11))
def test_a_limit_of_tokens_leaves_none_out(n_new: int) -> None:
    tokens, positions, stats = positions_of(n_new)
    assert tokens == [(1 + i) % 8 for i in range(n_new)]
    assert positions[:-1] == [0, *[1, 2, 3, 0] * 3][: n_new - 1]
    assert stats.n_accepted >= sum(position > 0 for position in positions)


@pytest.mark.parametrize(("eos_token", "position"), [(1, 0), (2, 1), (3, 2), (4, 3), (5, 0), (6, 1)])
def test_an_end_of_text_keeps_its_position(eos_token: int, position: int) -> None:
    tokens, positions, _ = positions_of(12, eos_token)
    assert tokens == list(range(1, eos_token + 1))
    assert positions == [0, 1, 2, 3, 0, 1][:eos_token] and positions[-1] == position


def test_without_drafts_every_token_is_head_1s() -> None:
    assert positions_of(9, n_draft=0)[1] == [0] * 9


def test_painter_colours_drafts_only() -> None:
    written: list[str] = []
    paint = Painter(written.append, coloured=True)
    for paint.position in (0, 1, len(COLOURS), len(COLOURS) + 1):
        paint("a\nb")
    assert written[0] == "a\nb" and written[1] == written[3] == "\x1b[32ma\nb\x1b[0m" != written[2]
    plain = Painter(written.append, coloured=False)
    plain.position = 1
    plain("c")
    plain.legend(3)
    assert written[4:] == ["c"]
    paint.legend(0)
    assert written[5:] == []
    paint.legend(2)
    assert ESCAPE.sub("", "".join(written[5:])) == "head 1  draft 1  draft 2  \n"


GREEDY = ("--prompt", "def add", "--temperature", "0", "--max-new-tokens", "40")


@pytest.mark.parametrize(
    ("environment", "coloured"),
    [({"TERM": "xterm"}, True), ({"TERM": "xterm", "NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)],
)
def test_a_terminal_gets_colours(
    trained: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str],
    coloured: bool,
) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "COLORTERM", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    assert main(["generate", "--checkpoint", str(trained), *GREEDY]) == 0
    plain = capsys.readouterr().out
    assert not ESCAPE.search(plain)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert main(["generate", "--checkpoint", str(trained), *GREEDY]) == 0
    shown = capsys.readouterr().out
    assert bool(ESCAPE.search(shown)) == coloured
    legend = "head 1  draft 1  \n" if coloured else ""
    assert ESCAPE.sub("", shown) == plain + legend


def test_forced_colours_do_not_reach_a_pipe(
    trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert main(["generate", "--checkpoint", str(trained), *GREEDY]) == 0
    assert not ESCAPE.search(capsys.readouterr().out)


@pytest.mark.slow
def test_a_real_terminal(trained: Path) -> None:
    ours, theirs = os.openpty()
    command: list[Any] = [sys.executable, "-m", "mtp_ext", "generate", "--checkpoint", trained, *GREEDY]
    environment = {name: value for name, value in os.environ.items() if name != "NO_COLOR"} | {"TERM": "xterm"}
    with subprocess.Popen(command, stdout=theirs, stderr=subprocess.PIPE, env=environment, text=True) as process:
        os.close(theirs)
        _, error = process.communicate(timeout=120)
    shown = os.read(ours, 1 << 16).decode()
    os.close(ours)
    assert process.returncode == 0 and ESCAPE.search(shown) and shown.endswith("draft 1  \x1b[0m\r\n")
    assert re.fullmatch(r"mtp generate: \d+ tokens, .* tokens/s\n", error)


@pytest.mark.parametrize("n_draft", ["0", "1"])
def test_the_last_line_has_the_statistics(trained: Path, capsys: pytest.CaptureFixture[str], n_draft: str) -> None:
    assert main(["generate", "--checkpoint", str(trained), *GREEDY, "--n-draft", n_draft]) == 0
    line = capsys.readouterr().err
    saved = load_saved_model(trained, torch.device("cpu"))
    prompt = torch.tensor([list(b"def add")])
    stats = generate(saved.model, prompt, 40, n_draft=int(n_draft), eos_token=256).stats
    assert line.startswith(
        f"mtp generate: {stats.n_tokens} tokens, {stats.tokens_per_forward:.2f} tokens per forward, "
    )
    rate = f"{stats.draft_acceptance_rate:.0%} of the drafts accepted (by position "
    assert (rate in line) == (n_draft == "1") and re.search(r", [\d,]+ tokens/s\n$", line)


def test_one_token_has_no_speed(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--checkpoint", str(trained), "--prompt", "a", "--max-new-tokens", "1"]) == 0
    assert capsys.readouterr().err == "mtp generate: 1 token\n"


def test_the_number_of_drafts_may_be_left_to_the_decoder(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []

    def fake(*arguments: Any, n_draft: Any, **options: Any) -> GenerationOutput:
        given.append(n_draft)
        return generate(*arguments, n_draft=1, **options)

    monkeypatch.setattr("mtp_ext.cli.generate.generate", fake)
    monkeypatch.setattr("mtp_ext.generate.measure.generate", fake)
    assert main(["generate", "--checkpoint", str(trained), *GREEDY, "--n-draft", "auto"]) == 0
    assert main(["evaluate", "--checkpoint", str(trained), "--decode.n-draft", "auto", "--decode.prompts", "1"]) == 0
    assert given and set(given) == {"auto"}
