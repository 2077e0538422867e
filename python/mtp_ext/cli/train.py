"""``mtp train``: trains a model, or continues a run."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, TextIO, cast

import tyro
from rich.console import Console

from mtp_ext.cli.errors import FOLLOWED
from mtp_ext.cli.launch import launch
from mtp_ext.distributed.ranks import Ranks, joined_ranks
from mtp_ext.train.checkpoint.directory import Checkpoint
from mtp_ext.train.checkpoint.resume import check_same_run, find_checkpoint
from mtp_ext.train.config import DEFAULT_MAX_SECONDS, TrainConfig, check_at_least
from mtp_ext.train.config_file import read_config, read_toml
from mtp_ext.train.report.display import LastingStream
from mtp_ext.train.run import train

LIMITS = ("max_steps", "max_seconds", "max_tokens")


@dataclass(frozen=True)
class TrainCommand:
    """Train a multi-token prediction model, or continue a run.

    Without options, trains a 4-token model on the source of Python's standard library for 300 seconds. The run ends at
    the first limit that it reaches. Options here override those of --config, which override those of the checkpoint of
    --resume.
    """

    config: Path | None = None
    """A TOML file of these options, such as the config.toml that every run writes."""
    resume: str | None = None
    """Continue a run: its directory, one of its checkpoints, or "auto", the newest run (a new one if there is none)."""
    nproc: int = 1
    """Number of processes on this machine that train together. Under torchrun, leave it out."""
    run: Annotated[TrainConfig, tyro.conf.arg(name="")] = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        check_at_least(1, "", self, "nproc")


def run(arguments: Sequence[str]) -> int:
    """Runs the command; returns the exit code."""
    n_processes, is_started = _n_processes(arguments), "RANK" in os.environ
    if n_processes > 1 and not is_started:
        parse(arguments)  # its errors and --help come from this process, once
        return launch(arguments, n_processes)
    with joined_ranks() as ranks:
        if is_started and n_processes not in (1, ranks.size):
            raise ValueError(f"nproc must be left out under torchrun, which started {ranks.size}, got {n_processes}")
        try:
            return _run(arguments, ranks)
        except BaseException:
            if ranks.fails_first():
                raise
            raise SystemExit(FOLLOWED) from None


def _run(arguments: Sequence[str], ranks: Ranks) -> int:
    """Trains with the other processes, which do as the main one's arguments say."""
    config, checkpoint = ranks.from_main(lambda: parse(arguments))
    console = Console(file=cast(TextIO, LastingStream(sys.stdout)))
    if checkpoint is not None:
        for change in check_same_run(read_config(checkpoint.path), config):
            if ranks.is_main:
                console.print(f"changed on resuming: {change}", highlight=False, markup=False, soft_wrap=True)
    outcome = train(config, checkpoint, console, ranks)
    received = outcome.ending.received
    return 0 if received is None else 128 + received


def _n_processes(arguments: Sequence[str]) -> int:
    """Returns ``--nproc``; 1 where it is no such number, which :func:`parse` explains."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--nproc", default="1")
    value = first.parse_known_args(list(arguments))[0].nproc
    return int(value) if value.isdecimal() else 1


def parse(arguments: Sequence[str]) -> tuple[TrainConfig, Checkpoint | None]:
    """Parses the arguments into the run's configuration and the checkpoint to continue from.

    Limits are replaced together: the command line's replace all of the file's, and those all of the checkpoint's, so
    ``--max-steps 100`` alone means 100 steps however long they take.

    Raises:
        ValueError: The file or the checkpoint cannot be read, or the file holds an unknown key or a wrong value.
        SystemExit: The command line is wrong (2), or asks for help (0).
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", type=Path)
    first.add_argument("--resume")
    first.add_argument("--out", type=Path)
    early, _ = first.parse_known_args(list(arguments))

    checkpoint = None if early.resume is None else find_checkpoint(early.resume, early.out)
    saved = TrainConfig() if checkpoint is None else dataclasses.replace(read_config(checkpoint.path), out=None)
    layers = [saved]
    if early.config is not None:
        layers.append(read_toml(early.config, _without_limits(saved)))
    defaults = TrainCommand(early.config, early.resume, run=_without_limits(layers[-1]))
    command = tyro.cli(TrainCommand, default=defaults, args=list(arguments), prog="mtp train")
    layers.append(command.run)
    return _with_limits(command.run, layers), checkpoint


def _without_limits(config: TrainConfig) -> TrainConfig:
    return dataclasses.replace(config, max_steps=None, max_seconds=None, max_tokens=None)


def _with_limits(config: TrainConfig, layers: list[TrainConfig]) -> TrainConfig:
    """Returns ``config`` with the limits of the last layer that has any, or the default limit."""
    for layer in reversed(layers):
        limits = {name: getattr(layer, name) for name in LIMITS}
        if any(limit is not None for limit in limits.values()):
            return dataclasses.replace(config, **limits)
    return dataclasses.replace(config, max_seconds=DEFAULT_MAX_SECONDS)
