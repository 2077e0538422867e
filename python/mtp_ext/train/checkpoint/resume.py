"""Locks a run's directory, finds the checkpoint to resume from, and checks that it is still the same run."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from mtp_ext.train.checkpoint.directory import (
    Checkpoint,
    is_unchanged,
    last_good_checkpoint,
    list_checkpoints,
    resolve_checkpoint,
    set_aside,
)
from mtp_ext.train.config import TrainConfig
from mtp_ext.train.data.config import FREE
from mtp_ext.train.data.sources import RUN_LOCK_FILE

AUTO = "auto"
RUNS = Path("runs")
CHECKPOINTS = "checkpoints"

_log = logging.getLogger(__name__)


def find_checkpoint(resume: str, out: Path | None) -> Checkpoint | None:
    """Finds the checkpoint that ``--resume`` names.

    Args:
        resume: The directory of a checkpoint or of a run, or "auto": the latest of the run ``out``, or of the newest
            run (by the time of its last checkpoint) that has one.
        out: The run's directory, if given.
    Returns:
        The checkpoint; ``None`` if "auto" finds none, which starts a new run.
    Raises:
        ValueError: The path holds no complete checkpoint.
    """
    if resume != AUTO:
        return resolve_checkpoint(Path(resume))
    runs = [out] if out is not None else [path for path in RUNS.glob("*") if path.is_dir()]
    latest = [found[-1] for run in runs if (found := list_checkpoints(run / CHECKPOINTS))]
    for candidate in sorted(latest, key=lambda checkpoint: checkpoint.written, reverse=True):
        checkpoint = last_good_checkpoint(candidate.path.parent)
        if checkpoint is not None:
            _warn_of_newer(runs, checkpoint)
            return checkpoint
    return None


def _warn_of_newer(runs: Sequence[Path], chosen: Checkpoint) -> None:
    """Logs the runs that began after a checkpoint was written but have none of their own."""
    for run in runs:
        config = run / "config.json"
        if config.is_file() and config.stat().st_mtime > chosen.written and not list_checkpoints(run / CHECKPOINTS):
            _log.warning("resume: %s is newer but has no checkpoint; continuing %s", run, chosen.path)


def run_of(checkpoint: Checkpoint) -> Path | None:
    """Returns the directory of a checkpoint's run; ``None`` for a checkpoint that was copied elsewhere."""
    parent = checkpoint.path.absolute().parent
    return checkpoint.path.parent.parent if parent.name == CHECKPOINTS else None


@contextmanager
def hold_run(out: Path | None, checkpoint: Checkpoint | None) -> Iterator[Path]:
    """Creates and locks the directory of a run: ``out``, else that of the checkpoint's run, else a new one in `runs/`.

    The lock is released with the block or the process. A directory that is still empty then is deleted.

    Raises:
        ValueError: The directory holds another run or a later part of the same one, another process trains in it, or it
            cannot be created.
    """
    own = run_of(checkpoint) if out is None and checkpoint is not None else out
    directory = RUNS if own is None else own
    try:
        if own is None:
            directory = _new_directory(RUNS / time.strftime("%Y%m%d-%H%M%S"))
        directory.mkdir(parents=True, exist_ok=True)
        lock = FileLock(directory / RUN_LOCK_FILE, timeout=0)
        lock.acquire()
    except Timeout:
        raise ValueError(
            f"out: another process is training in {directory}; wait until it ends, or pass another --out"
        ) from None
    except OSError as error:
        raise ValueError(f"out: expected a directory that can be written, got {directory} ({error.strerror})") from None
    try:
        _check_free(directory, checkpoint)
        yield directory
    finally:
        with suppress(OSError):
            if [path.name for path in directory.iterdir()] == [RUN_LOCK_FILE]:
                (directory / RUN_LOCK_FILE).unlink()
                directory.rmdir()
        lock.release()


def _new_directory(path: Path) -> Path:
    """Creates ``path``, or the first of ``path-2``, ``path-3``, ... that does not exist."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(1):
        candidate = path if number == 1 else path.with_name(f"{path.name}-{number}")
        with suppress(FileExistsError):
            candidate.mkdir()
            break
    return candidate


def _check_free(directory: Path, checkpoint: Checkpoint | None) -> None:
    """Raises ValueError if a run's directory holds another run, or a later part of the run than ``checkpoint``."""
    present = list_checkpoints(directory / CHECKPOINTS)
    if not present:
        return
    if checkpoint is None:
        raise ValueError(
            f"out: {directory} already holds a run; pass --resume {directory} to continue it, or another --out"
        )
    while present and present[-1].path.resolve() != checkpoint.path.resolve():
        if not is_unchanged(present[-1]):
            set_aside(present.pop())  # else it would count as the latest of the run
            continue
        raise ValueError(
            f"resume: {directory} continues after {checkpoint.path.name}, up to {present[-1].path.name}; resume from "
            "there, or pass another --out to branch off"
        )


def check_same_run(saved: TrainConfig, wanted: TrainConfig) -> list[str]:
    """Compares the configuration of a checkpoint with that of the run to resume.

    Returns:
        The allowed differences, formatted as "optim.lr: 0.003 -> 0.001".
    Raises:
        ValueError: An option differs that must not change on resuming; the message names all of them.
    """
    free: list[str] = []
    fixed: list[str] = []
    for name, before, after, is_free in _differences(saved, wanted):
        (free if is_free else fixed).append(f"{name}: {_shown(before)} -> {_shown(after)}")
    if fixed:
        raise ValueError(
            f"resume: these options must not differ from those of the checkpoint: {'; '.join(fixed)}. Leave them out "
            "to continue the run, or start a new one"
        )
    return free


def _differences(saved: Any, wanted: Any, prefix: str = "") -> list[tuple[str, Any, Any, bool]]:
    """Returns the fields that differ: dotted name, both values, whether the change is allowed."""
    found = []
    for field in dataclasses.fields(saved):
        before, after = getattr(saved, field.name), getattr(wanted, field.name)
        if dataclasses.is_dataclass(before):
            found += _differences(before, after, f"{prefix}{field.name}.")
        elif not _is_same(field.name, before, after):
            found.append((f"{prefix}{field.name}", before, after, field.metadata == FREE))
    return found


def _is_same(name: str, before: Any, after: Any) -> bool:
    """Returns True if a field means the same; without ``out`` a run stays where it is."""
    if isinstance(before, Path) and isinstance(after, Path):
        return before.resolve() == after.resolve()
    return bool(before == after) or (name == "out" and after is None)


def _shown(value: Any) -> str:
    """Formats a value as people write it."""
    return "none" if value is None else str(value) if isinstance(value, Path) else repr(value)
