"""``mtp train --nproc``: one set of lines, one sentence on failure, signals and losses end all processes."""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from mtp_ext.cli.main import main
from mtp_ext.train.checkpoint.directory import list_checkpoints
from mtp_ext.train.config import TrainConfig
from mtp_ext.train.config_file import write_config
from tests.train.tiny import tiny_config

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")


def start(config: TrainConfig, root: Path, *options: str, torchrun: bool = False) -> subprocess.Popen[str]:
    write_config(config, root)
    started = ["-m", "torch.distributed.run", "--nproc-per-node", "2"] if torchrun else []
    command = [sys.executable, *started, "-m", "mtp_ext", "train", "--config", str(root / "config.toml"), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True, cwd=root)


def wait_for_steps(run: Path, steps: int = 3) -> None:
    deadline = time.monotonic() + 120
    metrics = run / "metrics.jsonl"
    while not metrics.exists() or metrics.read_text().count("\n") < steps:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def processes_of(parent: int) -> list[int]:
    """The children of a process, by rank."""
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    environments = {int(pid): Path(f"/proc/{pid}/environ").read_text() for pid in children}
    ranks = {int(re.search(r"\bRANK=(\d+)", text)[1]): pid for pid, text in environments.items()}  # type: ignore[index]
    return [ranks[rank] for rank in sorted(ranks)]


@pytest.mark.slow
def test_two_processes_print_and_write_once(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    config = dataclasses.replace(config, logging=dataclasses.replace(config.logging, plots=True, sample_tokens=8))
    out, err = start(config, tmp_path, "--nproc", "2").communicate(timeout=240)
    assert err == ""
    assert out.count("corpus     ") == out.count("run        ") == out.count("accept length") == 1
    assert "in each of 2 processes" in out
    assert [c.step for c in list_checkpoints(tmp_path / "run" / "checkpoints")] == [4]
    assert (tmp_path / "run" / "summary.json").exists()
    assert (
        main(["evaluate", "--checkpoint", str(tmp_path / "run"), "--device", "cpu"]) == 0
    )  # one process reads the checkpoint


@pytest.mark.slow
def test_torchrun_continues_the_run_of_one_process(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    write_config(config, tmp_path)
    assert main(["train", "--config", str(tmp_path / "config.toml"), "--max-steps", "2"]) == 0
    resume = ("--resume", str(tmp_path / "run"), "--max-steps", "5")
    process = start(dataclasses.replace(config, out=None), tmp_path, *resume, torchrun=True)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert out.count("continuing ") == 1
    assert [c.step for c in list_checkpoints(tmp_path / "run" / "checkpoints")] == [2, 5]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT])  # SIGTERM: to any process, below
def test_a_signal_stops_all_processes_after_the_same_step(tmp_path: Path, number: signal.Signals) -> None:
    process = start(tiny_config(tmp_path, max_steps=100_000), tmp_path, "--nproc", "3", "--batch.batch-size", "3")
    wait_for_steps(tmp_path / "run")
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 128 + number
    assert err.count(number.name) == 1 and "finishing this step" in err
    (checkpoint,) = list_checkpoints(tmp_path / "run" / "checkpoints")
    assert f"stopped by {number.name} after step {checkpoint.step};" in out


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the processes in /proc")
def test_a_signal_to_any_process_stops_all(tmp_path: Path) -> None:
    process = start(tiny_config(tmp_path, max_steps=100_000), tmp_path, "--nproc", "2")
    wait_for_steps(tmp_path / "run")
    os.kill(processes_of(process.pid)[1], signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM
    assert err == "" and "stopped by SIGTERM after step" in out


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the processes in /proc")
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_ends_the_others(tmp_path: Path, rank: int) -> None:
    process = start(tiny_config(tmp_path, max_steps=100_000), tmp_path, "--nproc", "2")
    wait_for_steps(tmp_path / "run")
    children = processes_of(process.pid)
    os.kill(children[rank], signal.SIGKILL)
    _, err = process.communicate(timeout=120)
    assert process.returncode not in (0, None)
    assert f"mtp train: process {rank} of 2 was killed by SIGKILL" in err
    assert "Traceback" not in err
    assert not any(Path(f"/proc/{child}").exists() for child in children)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "code", "sentence"),
    [
        (("--batch.batch-size", "3"), 2, "batch_size must be a multiple of world_size 2, got 3"),
        (("--optim.lr", "1e30", "--schedule.warmup-steps", "0"), 1, "the loss is not finite"),
        (("--data.source", "nowhere"), 2, "nowhere"),
    ],
)
def test_a_failure_is_one_sentence(tmp_path: Path, options: tuple[str, ...], code: int, sentence: str) -> None:
    process = start(tiny_config(tmp_path, max_steps=20), tmp_path, "--nproc", "2", *options)
    _, err = process.communicate(timeout=240)
    assert process.returncode == code
    assert sentence in err and err.startswith("mtp train: ") and err.count("\n") == 1, err


@pytest.mark.parametrize(
    ("value", "message"), [("0", "must be at least 1, got 0"), ("-1", "must be at least 1, got -1"), ("two", "nproc")]
)
def test_a_wrong_number_of_processes(value: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    limits = ["--max-steps", "1", "--data.source", "nowhere"]  # nothing is trained if the check fails
    try:
        assert main(["train", f"--nproc={value}", *limits]) == 2
    except SystemExit as error:
        assert error.code == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "nproc" in error and message in error and "torchrun, which started" not in error
