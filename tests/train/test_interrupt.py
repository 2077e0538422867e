"""Signals, kills and losses that are not finite: the last checkpoint is whole, and the run goes on from it."""

from __future__ import annotations

import dataclasses
import os
import random
import signal
import time
from pathlib import Path

import pytest

from mtp_ext.train.checkpoint.directory import list_checkpoints, load_model_state, load_training_state
from mtp_ext.train.config import CheckpointConfig, OptimConfig
from mtp_ext.train.interrupt import StopRequest
from mtp_ext.train.loop import TrainingFailedError
from mtp_ext.train.report.record import read_metrics
from tests.train.processes import TrainingProcess, n_lines
from tests.train.tiny import run, tiny_config

MANY_STEPS = 100_000


def latest_step(directory: Path) -> int:
    """Of the last whole checkpoint of a run; 0 without one."""
    return max((c.step for c in list_checkpoints(directory / "checkpoints")), default=0)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_finishes_the_step_and_writes_a_checkpoint(tmp_path: Path, number: signal.Signals) -> None:
    config = tiny_config(tmp_path, max_steps=MANY_STEPS)
    training = TrainingProcess(config)
    training.wait_for(lambda: n_lines(tmp_path / "run" / "metrics.jsonl") >= 3)
    assert training.process.pid is not None
    os.kill(training.process.pid, number)
    assert training.wait() == 128 + number, training.output
    output = training.output
    assert "Traceback" not in output
    assert f"{number.name}: finishing this step and writing a checkpoint" in output
    assert f"continue with: mtp train --resume {tmp_path / 'run'}" in output
    (checkpoint,) = list_checkpoints(tmp_path / "run" / "checkpoints")
    steps = [r["step"] for r in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    assert checkpoint.step == steps[-1] == len(steps)


def test_a_second_signal_ends_at_once() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.received is signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    signal.signal(signal.SIGINT, before)


def test_handlers_are_given_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.slow
def test_a_killed_run_goes_on_from_a_whole_checkpoint(tmp_path: Path) -> None:
    """Killed while it does little else than write checkpoints; the result is that of the run that was never killed."""
    chance = random.Random(0)
    config = tiny_config(
        tmp_path, max_steps=MANY_STEPS, checkpoint=CheckpointConfig(every_seconds=0, every_steps=1, keep_last=2)
    )
    directory, step = tmp_path / "run", 0
    for _ in range(5):
        training = TrainingProcess(config, "--resume", "auto", "--out", str(directory))
        training.wait_for(lambda: latest_step(directory) > step + 2)  # noqa: B023
        time.sleep(chance.uniform(0.0, 0.1))
        training.process.kill()
        assert training.wait() == -signal.SIGKILL
        assert "Traceback" not in training.output
        checkpoint = list_checkpoints(directory / "checkpoints")[-1]
        assert checkpoint.step > step
        step = checkpoint.step
        load_model_state(checkpoint)
        assert load_training_state(checkpoint)["progress"]["step"] == step

    run(dataclasses.replace(config, max_steps=step + 1), checkpoint)
    run(dataclasses.replace(config, max_steps=step + 1, out=tmp_path / "whole"))
    resumed, whole = (
        [(r["step"], r["head_loss"]) for r in read_metrics(d / "metrics.jsonl") if r["kind"] == "train"]
        for d in (directory, tmp_path / "whole")
    )
    # The learning rate follows the fraction of the limit, and the limit was another one before the last kill.
    assert [s for s, _ in resumed] == [s for s, _ in whole]
    assert resumed[0] == whole[0]


def test_a_loss_that_is_not_finite_stops_and_keeps_the_good_checkpoint(tmp_path: Path) -> None:
    config = tiny_config(
        tmp_path,
        max_steps=50,
        optim=OptimConfig(name="adamw", lr=1e30, clip_norm=0.0),
        checkpoint=CheckpointConfig(every_seconds=0, every_steps=1, keep_last=1),
    )
    config = dataclasses.replace(config, schedule=dataclasses.replace(config.schedule, warmup_steps=0))
    with pytest.raises(TrainingFailedError, match=r"step \d+: the loss is not finite") as error:
        run(config)
    (checkpoint,) = list_checkpoints(tmp_path / "run" / "checkpoints")
    assert f"the last good checkpoint is {checkpoint.path}" in str(error.value)
    assert f"step {checkpoint.step + 1}:" in str(error.value)
    assert all(value.isfinite().all() for value in load_model_state(checkpoint).values())


def test_a_limit_in_seconds_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that goes half a second a look; the learning rate falls to its ratio with the time."""
    now = 0.0

    def clock() -> float:
        nonlocal now
        now += 0.5
        return now

    monkeypatch.setattr(time, "perf_counter", clock)
    config = tiny_config(tmp_path, max_steps=None, max_seconds=40.0)
    config = dataclasses.replace(config, schedule=dataclasses.replace(config.schedule, warmup_steps=0))
    run(config)
    train = [r for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if r["kind"] == "train"]
    assert 38.0 <= train[-1]["seconds"] < 44.0  # a step looks at the clock a few times
    assert 5 < len(train) < 40
    assert train[0]["lr"] == config.optim.lr
    assert train[-1]["lr"] < 0.1 * config.optim.lr
