"""A resumed run is the run that was never stopped, to the bit."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from mtp_ext.cli.main import main
from mtp_ext.train.checkpoint.directory import Checkpoint, list_checkpoints, load_model_state, load_training_state
from mtp_ext.train.checkpoint.resume import check_same_run, find_checkpoint
from mtp_ext.train.config import CheckpointConfig, EvaluationConfig, ModelConfig, OptimConfig, ScheduleConfig
from mtp_ext.train.config_file import write_config
from mtp_ext.train.report.record import read_metrics
from tests.train.test_checkpoint import flip_a_bit
from tests.train.tiny import run, tiny_config

pytestmark = pytest.mark.slow

TIMES = ("seconds", "tokens_per_second", "memory_bytes")


def records(directory: Path) -> list[dict[str, Any]]:
    """The records without what the clock decides."""
    kept = list(read_metrics(directory / "metrics.jsonl"))
    return [{name: value for name, value in record.items() if name not in TIMES} for record in kept]


def latest(directory: Path) -> Checkpoint:
    return list_checkpoints(directory / "checkpoints")[-1]


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_four_and_four_steps_are_eight(tmp_path: Path, name: str) -> None:
    """With accumulation, clipping that bites, a warmup across the stop, validations, and an epoch that ends within."""
    config = tiny_config(
        tmp_path,
        max_steps=8,
        optim=OptimConfig(name=name, clip_norm=0.3),  # type: ignore[arg-type]
        schedule=ScheduleConfig(warmup_steps=6),
        evaluation=EvaluationConfig(every_steps=3, batches=2),
        checkpoint=CheckpointConfig(every_seconds=0, every_steps=4, keep_last=10),
    )
    config = dataclasses.replace(config, batch=dataclasses.replace(config.batch, batch_size=40))
    run(dataclasses.replace(config, out=tmp_path / "whole"))
    run(dataclasses.replace(config, out=tmp_path / "parts"))
    for path in (tmp_path / "parts" / "checkpoints").iterdir():  # as if killed after the checkpoint of step 4
        if path.name != "step-00000004":
            for file in sorted(path.rglob("*"), reverse=True):
                file.unlink() if file.is_file() else file.rmdir()
    torch.manual_seed(123)  # the generator's state comes from the checkpoint
    checkpoint = latest(tmp_path / "parts")
    assert checkpoint.step == 4
    run(dataclasses.replace(config, out=tmp_path / "parts"), checkpoint)

    whole, parts = records(tmp_path / "whole"), records(tmp_path / "parts")
    assert [r["step"] for r in whole if r["kind"] == "train"] == list(range(1, 9))
    assert max(r["epochs"] for r in whole) > 1.0
    assert min(r["grad_norm"] for r in whole if r["kind"] == "train") > 0.3
    assert parts == whole
    one, other = latest(tmp_path / "whole"), latest(tmp_path / "parts")
    for a, b in zip(load_model_state(one).values(), load_model_state(other).values(), strict=True):
        assert torch.equal(a, b)
    first, second = load_training_state(one), load_training_state(other)
    assert first["stream"] == second["stream"]
    assert torch.equal(first["rng"]["cpu"], second["rng"]["cpu"])
    assert str(first["optimizers"]) == str(second["optimizers"])


def test_a_stop_by_a_limit_continues_with_a_higher_one(tmp_path: Path) -> None:
    """Exact too while the schedule is flat: it is the schedule alone that a longer run changes."""
    flat = ScheduleConfig(warmup_steps=0, decay_ratio=1.0)
    config = tiny_config(tmp_path, schedule=flat)
    run(dataclasses.replace(config, out=tmp_path / "whole", max_steps=4))
    run(dataclasses.replace(config, out=tmp_path / "parts", max_steps=2))
    run(dataclasses.replace(config, out=tmp_path / "parts", max_steps=4), latest(tmp_path / "parts"))
    train = [r for r in records(tmp_path / "parts") if r["kind"] == "train"]
    assert train == [r for r in records(tmp_path / "whole") if r["kind"] == "train"]


def test_two_runs_of_a_seed_are_equal_and_of_two_are_not(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, max_steps=2)
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(dataclasses.replace(config, out=tmp_path / name, seed=seed))
    assert records(tmp_path / "a") == records(tmp_path / "b")
    assert records(tmp_path / "a") != records(tmp_path / "c")


def test_the_state_is_plain(tmp_path: Path) -> None:
    """``weights_only=True`` reads it, and it says where the run is."""
    config = tiny_config(tmp_path, max_steps=2)
    run(config)
    state = load_training_state(latest(tmp_path / "run"))
    assert state["progress"]["step"] == 2
    assert state["progress"]["tokens"] == 2 * 24 * 2 * 2


def test_options_that_make_another_run_are_named(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    other = dataclasses.replace(
        config,
        seed=7,
        model=dataclasses.replace(config.model, d_model=32),
        data=dataclasses.replace(config.data, tokenizer="bpe:300"),
    )
    with pytest.raises(ValueError, match="must not differ") as error:
        check_same_run(config, other)
    for part in ("seed: 0 -> 7", "model.d_model: 16 -> 32", "data.tokenizer: 'bytes' -> 'bpe:300'"):
        assert part in str(error.value)


def test_options_that_may_change_are_listed(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    other = dataclasses.replace(config, max_steps=9, optim=dataclasses.replace(config.optim, lr=0.5))
    assert check_same_run(config, other) == ["max_steps: 4 -> 9", "optim.lr: 0.003 -> 0.5"]
    assert check_same_run(config, config) == []


def test_a_changed_corpus_is_an_error(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, max_steps=1)
    run(config)
    file = tmp_path / "corpus" / "module_0.py"
    file.write_text(file.read_text() + "# one more line\n")
    with pytest.raises(ValueError, match=r"cannot find the corpus of .*corpus holds 12 documents .*; restore it"):
        run(dataclasses.replace(config, max_steps=2), latest(tmp_path / "run"))


def test_a_run_is_not_overwritten(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, max_steps=1)
    run(config)
    with pytest.raises(ValueError, match="already holds a run; pass --resume"):
        run(config)


def test_an_older_checkpoint_branches_off_elsewhere_only(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, max_steps=2, checkpoint=CheckpointConfig(every_seconds=0, every_steps=1))
    run(config)
    older = list_checkpoints(tmp_path / "run" / "checkpoints")[0]
    longer = dataclasses.replace(config, max_steps=3)
    with pytest.raises(ValueError, match=r"continues after step-00000001, up to step-00000002"):
        run(longer, older)
    branch = run(dataclasses.replace(longer, out=tmp_path / "branch"), older)
    assert latest(branch.directory).step == 3
    assert [r["step"] for r in records(branch.directory) if r["kind"] == "train"] == [2, 3]


def test_auto_takes_the_newest_run_that_has_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """By the time of its last checkpoint, whatever the names; a newer run without one is named."""
    monkeypatch.chdir(tmp_path)
    config = tiny_config(tmp_path, max_steps=1)
    assert find_checkpoint("auto", None) is None
    for name in ("zebra", "20250101-000000", "Apple"):
        run(dataclasses.replace(config, out=Path("runs") / name))
    found = find_checkpoint("auto", None)
    assert found is not None and found.path.parts[1] == "Apple"
    zebra = latest(Path("runs/zebra"))
    run(dataclasses.replace(config, out=Path("runs/zebra"), max_steps=2), zebra)
    os.utime(Path("runs/Apple/checkpoints/step-00000001/manifest.json"))  # as copying does
    found = find_checkpoint("auto", None)
    assert found is not None and found.path.parts[1] == "zebra" and not caplog.messages
    died = Path("runs/20260101-000000")
    died.mkdir()
    write_config(config, died)
    assert find_checkpoint("auto", None) == found
    assert caplog.messages == [f"resume: {died} is newer but has no checkpoint; continuing {found.path}"]
    assert find_checkpoint("auto", tmp_path / "elsewhere") is None


def test_auto_skips_what_is_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = tiny_config(tmp_path, max_steps=1)
    for name in ("a", "b"):
        run(dataclasses.replace(config, out=Path("runs") / name))
    flip_a_bit(latest(Path("runs/b")).path / "model.safetensors")
    found = find_checkpoint("auto", None)
    assert found is not None and found.path.parts[1] == "a"


def test_a_run_goes_on_over_a_damaged_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also with one checkpoint to keep: the damaged one does not count as the latest."""
    every = CheckpointConfig(every_seconds=0, every_steps=1, keep_last=2)
    config = tiny_config(tmp_path, max_steps=3, checkpoint=every)
    run(config)
    flip_a_bit(latest(tmp_path / "run").path / "state.pt")
    options = ["--max-steps", "3", "--checkpoint.keep-last", "1"]
    assert main(["train", "--resume", str(tmp_path / "run"), *options]) == 0
    assert "continuing" in capsys.readouterr().out
    names = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert len(names) == 2 and names[0].startswith("damaged-step-00000003") and names[1] == "step-00000003"
    load_model_state(latest(tmp_path / "run"))


def test_only_a_directory_that_moves_is_a_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    saved = dataclasses.replace(tiny_config(tmp_path), out=Path("a"), cache=None)
    for out in (None, Path("a"), tmp_path / "a", Path("b/../a")):
        assert check_same_run(saved, dataclasses.replace(saved, out=out)) == []
    changed = dataclasses.replace(saved, out=Path("b"), cache=Path("c"), max_seconds=60.0)
    assert check_same_run(saved, changed) == ["out: a -> b", "max_seconds: none -> 60.0", "cache: none -> c"]


def test_a_checkpoint_stands_alone(tmp_path: Path) -> None:
    """Copied away from its run, it still holds the model's shape, the configuration and the tokenizer."""
    run(tiny_config(tmp_path, max_steps=1))
    copy = latest(tmp_path / "run").path.rename(tmp_path / "copy")
    assert json.loads((copy / "model.json").read_text())["d_model"] == 16
    assert json.loads((copy / "config.json").read_text())["model"] == dataclasses.asdict(
        ModelConfig(n_future=2, d_model=16, n_layers=3, n_attn_heads=2, d_ff=32)
    )
    assert (copy / "config.toml").is_file() and (copy / "tokenizer").is_dir()
