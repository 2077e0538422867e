"""Training in a process of its own, to be interrupted."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from mtp_ext.train.config import TrainConfig
from mtp_ext.train.config_file import write_config

DEADLINE_SECONDS = 120.0


def start_training(config: TrainConfig, *options: str) -> subprocess.Popen[str]:
    """Starts ``mtp train`` on a configuration, one thread, without a terminal."""
    assert config.out is not None
    directory = config.out.with_name(f"{config.out.name}-config")
    directory.mkdir(exist_ok=True)
    write_config(config, directory)
    command = [sys.executable, "-m", "mtp_ext", "train", "--config", str(directory / "config.toml"), *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8", env=environment
    )


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Polls until something is true; fails with the process's output if it ends before."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "nothing happened in time"
        time.sleep(0.005)


def n_lines(path: Path) -> int:
    """Lines of a file that may not be there yet."""
    return path.read_text(encoding="utf-8").count("\n") if path.exists() else 0
