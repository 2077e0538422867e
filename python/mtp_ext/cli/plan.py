"""``mtp plan``: the memory of a training step, before the machine is there."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from rich.console import Console
from rich.table import Table

from mtp_ext.cli.architectures import read_shape
from mtp_ext.nn import MTPConfig
from mtp_ext.plan import Plan, left_out, plan
from mtp_ext.train.device import choose_compute


@dataclass(frozen=True)
class PlanCommand:
    """Plan the memory of a training step: the step itself runs on tensors without data."""

    preset: str | None = None
    """A shape from the paper's appendix M: 1M, 3M, 10M, ..., 13B."""
    config: Path | None = None
    """A TOML file of training options, or the directory of a checkpoint or a run, instead of a preset."""
    vocab_size: int = 32_000
    """Classes V of a preset."""
    n_future: int = 4
    """Heads n of a preset."""
    variant: str = "parallel"
    """Architecture of a preset's heads."""
    batch_size: int = 1
    """Sequences per forward pass."""
    seq_len: int | None = None
    """Tokens per sequence (default: the file's, or the model's longest)."""
    schedule: Literal["sequential", "joint", "autograd"] = "sequential"
    """Order of the heads."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Precision of the matrix products."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """The optimiser."""
    world_size: int = 1
    """Ranks; only 1 is planned so far."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ..., or auto: a GPU if there is one."""
    gib: float | None = None
    """Say whether it fits in this many GiB, and what would change that; the exit code is 1 if it does not fit."""
    json: bool = False
    """Print the numbers as JSON."""


def run(arguments: Sequence[str]) -> int:
    """Runs the command; returns the exit code."""
    command = tyro.cli(PlanCommand, args=list(arguments), prog="mtp plan")
    if command.gib is not None and not command.gib > 0:
        raise ValueError(f"gib must be greater than 0, got {command.gib}")
    config, seq_len = read_model(command)
    found = plan_of(command, config, seq_len)
    fits = command.gib is None or found.fits(command.gib)
    if command.json:
        answer = {} if command.gib is None else {"fits": fits}
        print(json.dumps({"model": config.to_dict(), "bytes": dataclasses.asdict(found.bytes), **answer}))
        return 0 if fits else 1
    console = Console(highlight=False)
    console.print(table(found))
    device = choose_compute(command.device, command.dtype).device
    console.print(f"not in it: {left_out(device)}", soft_wrap=True)
    if command.gib is not None:
        console.print(f"{'fits' if fits else 'does not fit'} in {command.gib:g} GiB")
    if not fits:
        for change, other in alternatives(command, config, seq_len):
            verdict = "fits" if other.fits(command.gib or 0) else "does not fit"
            console.print(f"  with {change}: {gib(other.bytes.peak)} GiB, {verdict}")
    return 0 if fits else 1


def read_model(command: PlanCommand) -> tuple[MTPConfig, int]:
    """Returns the model and the sequence length.

    Raises:
        ValueError: Not exactly one of preset and config is given, or it cannot be read.
    """
    if (command.preset is None) == (command.config is None):
        raise ValueError("preset: give either --preset or --config")
    if command.config is not None:
        config, seq_len = read_shape(command.config)
    else:
        assert command.preset is not None
        config = MTPConfig.preset(command.preset, command.vocab_size, command.n_future, command.variant)
        seq_len = config.max_seq_len
    return config, seq_len if command.seq_len is None else command.seq_len


def plan_of(command: PlanCommand, config: MTPConfig, seq_len: int) -> Plan:
    """Plans the step that the command describes."""
    return plan(
        config,
        batch_size=command.batch_size,
        seq_len=seq_len,
        schedule=command.schedule,
        dtype=command.dtype,
        optimizer=command.optimizer,
        world_size=command.world_size,
        device=command.device,
    )


def alternatives(command: PlanCommand, config: MTPConfig, seq_len: int) -> list[tuple[str, Plan]]:
    """Plans the changes that keep the model and its objective; half a batch goes with twice the accumulation."""
    changes: dict[str, PlanCommand] = {}
    if command.schedule != "sequential":
        changes["--schedule sequential"] = dataclasses.replace(command, schedule="sequential")
    if command.batch_size > 1:
        half = command.batch_size // 2
        changes[f"--batch-size {half}"] = dataclasses.replace(command, batch_size=half)
    return [(name, plan_of(changed, config, seq_len)) for name, changed in changes.items()]


def table(found: Plan) -> Table:
    """Formats the categories as a table."""
    rows = Table("at the peak", box=None, pad_edge=False)
    rows.add_column("GiB", justify="right")
    for name, size in dataclasses.asdict(found.bytes).items():
        rows.add_row(name, gib(size), style="bold" if name == "peak" else None)
    return rows


def gib(size: int) -> str:
    """Formats bytes in GiB."""
    return f"{size / 2**30:.2f}"
