"""Where a resumed run continues, and whether its configuration still is that of the same run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from mtp_ext.train.checkpoint.directory import Checkpoint, list_checkpoints, resolve_checkpoint
from mtp_ext.train.config import FREE, TrainConfig

AUTO = "auto"
RUNS = Path("runs")
CHECKPOINTS = "checkpoints"


def find_checkpoint(resume: str, out: Path | None) -> Checkpoint | None:
    """The checkpoint that ``--resume`` means.

    Args:
        resume: A checkpoint's or a run's directory, or "auto": the latest of the run ``out``, or of the newest run that
            has one.
        out: The run's directory, if it was given.
    Returns:
        The checkpoint; ``None`` where "auto" finds none, which starts a new run.
    Raises:
        ValueError: The path holds no whole checkpoint.
    """
    if resume != AUTO:
        return resolve_checkpoint(Path(resume))
    runs = [out] if out is not None else sorted(path for path in RUNS.glob("*") if path.is_dir())
    latest = [found[-1] for run in runs if (found := list_checkpoints(run / CHECKPOINTS))]
    return latest[-1] if latest else None


def run_of(checkpoint: Checkpoint) -> Path | None:
    """The run's directory that a checkpoint lies in; ``None`` for one that was copied elsewhere."""
    parent = checkpoint.path.absolute().parent
    return checkpoint.path.parent.parent if parent.name == CHECKPOINTS else None


def check_same_run(saved: TrainConfig, wanted: TrainConfig) -> list[str]:
    """Compares the configuration of a checkpoint with that of the run to resume.

    Returns:
        The differences that are allowed, for people: "optim.lr: 0.003 -> 0.001".
    Raises:
        ValueError: An option differs that would make it another run; the message names all of them.
    """
    free: list[str] = []
    fixed: list[str] = []
    for name, before, after, is_free in _differences(saved, wanted):
        (free if is_free else fixed).append(f"{name}: {before!r} -> {after!r}")
    if fixed:
        raise ValueError(
            f"resume: these options would make it another run than the checkpoint's: {'; '.join(fixed)}. Leave them "
            "out to continue it, or start a new run"
        )
    return free


def _differences(saved: Any, wanted: Any, prefix: str = "") -> list[tuple[str, Any, Any, bool]]:
    """Fields that differ: dotted name, both values, whether the run stays the same."""
    found = []
    for field in dataclasses.fields(saved):
        before, after = getattr(saved, field.name), getattr(wanted, field.name)
        if dataclasses.is_dataclass(before):
            found += _differences(before, after, f"{prefix}{field.name}.")
        elif before != after:
            found.append((f"{prefix}{field.name}", before, after, field.metadata == FREE))
    return found
