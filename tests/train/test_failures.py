"""Whatever ends a run, the last complete step is on the disk, one sentence says so, and the exit code is right."""

from __future__ import annotations

import dataclasses
import errno
import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mtp_ext.cli.main import main
from mtp_ext.train.checkpoint import directory as directory_module
from mtp_ext.train.checkpoint.directory import list_checkpoints, load_model_state, read_checkpoint
from mtp_ext.train.config import CheckpointConfig, EvaluationConfig, TrainConfig
from mtp_ext.train.config_file import write_config
from mtp_ext.train.interrupt import StopRequest
from mtp_ext.train.loop import TrainingFailedError
from mtp_ext.train.optim import Optimizers
from mtp_ext.train.report.record import MetricsWriter, read_metrics
from mtp_ext.train.trainer import Trainer
from tests.train.processes import TrainingProcess
from tests.train.tiny import run, tiny_config

FULL = OSError(errno.ENOSPC, "No space left on device")


def fail_at(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int, error: BaseException, *, after: bool = False
) -> None:
    """Raises from the ``call``-th call of a function, before it or after it did its work."""
    original: Callable[..., Any] = getattr(owner, name)
    calls = 0

    def wrapped(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call and not after:
            raise error
        result = original(*arguments, **options)
        if calls == call:
            raise error
        return result

    monkeypatch.setattr(owner, name, wrapped)


def steps(root: Path) -> list[int]:
    return [c.step for c in list_checkpoints(root / "run" / "checkpoints")]


def losses(directory: Path) -> list[tuple[int, Any]]:
    return [(r["step"], r["head_loss"]) for r in read_metrics(directory / "metrics.jsonl") if r["kind"] == "train"]


PLACES = {
    "data": (Trainer, "_order_state", False),
    "forward": (torch.Tensor, "backward", False),
    "backward": (torch.Tensor, "backward", True),
    "clipping": (Optimizers, "clip_gradients", True),
    "record": (MetricsWriter, "write", False),
}


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("error", [RuntimeError("CUDA out of memory"), FULL, ValueError("bad"), MemoryError()])
def test_an_error_leaves_a_checkpoint_of_the_last_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, error: Exception
) -> None:
    """The resumed run is the run that never failed: the batch of the failed step is not lost."""
    owner, name, after = PLACES[place]
    config = tiny_config(tmp_path, max_steps=6, batch=dataclasses.replace(tiny_config(tmp_path).batch, accumulation=1))
    fail_at(monkeypatch, owner, name, 4, error, after=after)
    done = 4 if place == "record" else 3
    with pytest.raises(TrainingFailedError, match=rf"after step {done}: .*Training stopped; the last good checkpoint"):
        run(config)
    monkeypatch.undo()
    assert steps(tmp_path) == [done]
    run(config, list_checkpoints(tmp_path / "run" / "checkpoints")[-1])
    run(dataclasses.replace(config, out=tmp_path / "whole"))
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


@pytest.mark.parametrize("error", [RuntimeError("device lost"), KeyboardInterrupt()])
@pytest.mark.parametrize("after", [False, True])
def test_a_step_that_failed_during_its_update_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, after: bool
) -> None:
    config = tiny_config(tmp_path, checkpoint=CheckpointConfig(every_seconds=0, every_steps=2, keep_last=9))
    fail_at(monkeypatch, torch.optim.AdamW, "step", 4, error, after=after)
    with pytest.raises((TrainingFailedError, KeyboardInterrupt), match=r"last good checkpoint is .*step-00000002"):
        run(config)
    assert steps(tmp_path) == [2]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3)])
def test_an_interrupt_without_a_signal_leaves_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    fail_at(monkeypatch, torch.Tensor, "backward", 6, error)
    with pytest.raises(type(error)):
        run(tiny_config(tmp_path))
    assert steps(tmp_path) == [2]


def test_an_error_before_the_first_step_says_that_there_is_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_at(monkeypatch, torch.Tensor, "backward", 1, RuntimeError("no"))
    with pytest.raises(TrainingFailedError, match=r"after step 0: RuntimeError: no\. Training stopped; there is no"):
        run(tiny_config(tmp_path))
    assert steps(tmp_path) == []


def test_an_error_in_a_validation_leaves_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_at(monkeypatch, Trainer, "evaluate", 1, RuntimeError("no"))
    with pytest.raises(TrainingFailedError, match="after step 3: RuntimeError: no"):
        run(tiny_config(tmp_path, evaluation=EvaluationConfig(every_steps=3)))
    assert steps(tmp_path) == [3]


def test_an_error_after_training_names_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_at(monkeypatch, Trainer, "evaluate", 1, TypeError("no"))
    with pytest.raises(TrainingFailedError, match=r"training ended with the checkpoint .*step-00000004, but the final"):
        run(tiny_config(tmp_path))


@pytest.mark.parametrize(
    ("stage", "error"),
    [
        ("save_file", FULL),
        ("save", RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")),
    ],
)
def test_a_full_disk_stops_the_run_with_the_last_good_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], stage: str, error: Exception
) -> None:
    config = tiny_config(tmp_path, checkpoint=CheckpointConfig(every_seconds=0, every_steps=1, keep_last=9))
    write_config(config, tmp_path)
    owner = directory_module if stage == "save_file" else torch
    fail_at(monkeypatch, owner, stage, 3, error)
    assert main(["train", "--config", str(tmp_path / "config.toml")]) == 1
    message = capsys.readouterr().err
    path = tmp_path / "run" / "checkpoints"
    assert message.count("\n") == 1
    assert f"mtp train: after step 3: checkpoint: cannot write {path}/step-00000003: " in message
    assert f"Training stopped; the last good checkpoint is {path}/step-00000002" in message
    assert sorted(p.name for p in path.iterdir()) == ["step-00000001", "step-00000002"]


def test_a_failing_record_does_not_hide_the_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="first"), MetricsWriter(tmp_path, tensorboard=False) as record:
        record._file.close()
        record._file = open("/dev/full", "w")
        record._file.write("x")
        raise RuntimeError("first")


@pytest.mark.slow
@pytest.mark.parametrize("stdout", ["pipe", "/dev/full", "closed"])
def test_a_run_outlives_its_standard_output(tmp_path: Path, stdout: str) -> None:
    config = tiny_config(tmp_path)
    config = dataclasses.replace(config, logging=dataclasses.replace(config.logging, sample_tokens=4, plots=True))
    training = TrainingProcess(config, stdout=stdout)
    assert training.wait() == 0, training.output
    expected = {"pipe": "(Broken pipe)", "/dev/full": "(No space left on device)"}
    if stdout != "closed":
        line = f"mtp train: cannot write to standard output {expected[stdout]}; training continues without display\n"
        assert training.output == line
    assert steps(tmp_path) == [4] and (tmp_path / "run" / "loss.png").is_file()
    for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        json.loads(line)  # no other text got the descriptor


@pytest.mark.slow
def test_a_failure_with_a_broken_output_has_its_exit_code(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, max_steps=20)
    config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, lr=1e38, clip_norm=0))
    config = dataclasses.replace(config, schedule=dataclasses.replace(config.schedule, warmup_steps=0))
    training = TrainingProcess(config, stdout="pipe")
    assert training.wait() == 1
    assert "the loss is not finite" in training.output and "Traceback" not in training.output


def test_a_second_hangup_is_ignored() -> None:
    """Kernel and shell both send one when a terminal closes."""
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGHUP)
        signal.raise_signal(signal.SIGHUP)
        assert stop.received is signal.SIGHUP
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL


def test_nohup_is_respected() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert stop.received is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_checkpoint_of_a_failed_run_is_that_of_its_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config: TrainConfig = tiny_config(tmp_path)
    fail_at(monkeypatch, torch.Tensor, "backward", 6, RuntimeError("no"))  # two micro-batches a step
    with pytest.raises(TrainingFailedError):
        run(config)
    monkeypatch.undo()
    every = CheckpointConfig(every_seconds=0, every_steps=1, keep_last=9)
    run(dataclasses.replace(config, out=tmp_path / "whole", checkpoint=every))
    failed, whole = (read_checkpoint(tmp_path / name / "checkpoints" / "step-00000002") for name in ("run", "whole"))
    assert failed is not None and whole is not None
    ours, theirs = load_model_state(failed), load_model_state(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
