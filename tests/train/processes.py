"""Training in a process of its own, to be interrupted."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import torch

from mtp_ext.train.config import TrainConfig
from mtp_ext.train.config_file import write_config
from tests.support import forked

DEADLINE_SECONDS = 120.0


class TrainingProcess:
    """``mtp train`` on a configuration, with one thread and without a terminal.

    Args:
        config: The run; its ``out`` is set.
        options: More of the command line.
    """

    def __init__(self, config: TrainConfig, *options: str, stdout: str = "file") -> None:
        assert config.out is not None
        directory = config.out.with_name(f"{config.out.name}-process")
        directory.mkdir(exist_ok=True)
        write_config(config, directory)
        self._output = directory / "output"
        arguments = ["train", "--config", str(directory / "config.toml"), *options]
        self.process: ForkServerProcess = forked.CONTEXT.Process(
            target=_main,
            args=(arguments, str(self._output), stdout),
            daemon=True,  # ends with the tests
        )
        self.process.start()

    @property
    def output(self) -> str:
        """What it printed so far, on both streams."""
        return self._output.read_text(encoding="utf-8") if self._output.exists() else ""

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Polls until something is true; fails with the output if the process ends before."""
        deadline = time.monotonic() + DEADLINE_SECONDS
        while not condition():
            assert self.process.is_alive(), self.output
            assert time.monotonic() < deadline, f"nothing happened in time: {self.output}"
            time.sleep(0.005)

    def wait(self) -> int:
        """The exit code, negative for a signal that ended it; one that does not end is killed."""
        self.process.join(DEADLINE_SECONDS)
        code = self.process.exitcode
        self.process.kill()
        assert code is not None, self.output
        return code


def _main(arguments: list[str], output: str, stdout: str) -> None:
    from mtp_ext.cli.main import main

    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    if stdout == "closed":
        os.close(1)
        sys.stdout = None  # as the interpreter starts
    elif stdout == "pipe":  # whose reader is gone
        reader, writer = os.pipe()
        os.close(reader)
        os.dup2(writer, 1)
    elif stdout != "file":
        os.dup2(os.open(stdout, os.O_WRONLY), 1)
    torch.set_num_threads(1)
    sys.exit(main(arguments))


def n_lines(path: Path) -> int:
    """Lines of a file that may not be there yet."""
    return path.read_text(encoding="utf-8").count("\n") if path.exists() else 0
