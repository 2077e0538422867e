"""Which options win: command line, file, checkpoint, defaults."""

from __future__ import annotations

from pathlib import Path

import pytest

from mtp_ext.cli.train import parse
from mtp_ext.train.config import DEFAULT_MAX_SECONDS, TrainConfig
from mtp_ext.train.progress import Limits
from tests.train.tiny import run, tiny_config


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text("seed = 3\nmax_steps = 50\n[optim]\nlr = 0.25\nweight_decay = 0.5\n", encoding="utf-8")
    return path


def test_the_default_run_takes_five_minutes() -> None:
    config, checkpoint = parse([])
    assert checkpoint is None
    assert config.limits == Limits(max_seconds=DEFAULT_MAX_SECONDS) == Limits(max_seconds=300.0)
    assert config.data == TrainConfig().data and config.data.source == ("stdlib",)


def test_the_command_line_overrides_the_file(file: Path) -> None:
    config, _ = parse(["--config", str(file), "--optim.lr", "0.125"])
    assert (config.seed, config.optim.lr, config.optim.weight_decay) == (3, 0.125, 0.5)
    assert config.limits == Limits(max_steps=50)


@pytest.mark.parametrize("form", ["--config={}", "--config {}"])
def test_the_file_may_stand_anywhere(file: Path, form: str) -> None:
    config, _ = parse(["--seed", "9", *form.format(file).split(" ")])
    assert (config.seed, config.optim.lr) == (9, 0.25)


def test_limits_of_the_command_line_replace_those_of_the_file(file: Path) -> None:
    config, _ = parse(["--config", str(file), "--max-tokens", "99"])
    assert config.limits == Limits(max_tokens=99)


def test_limits_may_be_combined() -> None:
    config, _ = parse(["--max-steps", "9", "--max-seconds", "60"])
    assert config.limits == Limits(max_steps=9, max_seconds=60.0)


def test_a_resumed_run_keeps_its_options(tmp_path: Path, file: Path) -> None:
    saved = tiny_config(tmp_path, max_steps=1, seed=5)
    run(saved)
    config, checkpoint = parse(["--resume", str(tmp_path / "run")])
    assert checkpoint is not None and checkpoint.step == 1
    assert (config.seed, config.limits, config.model) == (5, Limits(max_steps=1), saved.model)
    config, _ = parse(["--resume", str(tmp_path / "run"), "--config", str(file), "--max-steps", "7"])
    assert (config.optim.lr, config.limits, config.model) == (0.25, Limits(max_steps=7), saved.model)
