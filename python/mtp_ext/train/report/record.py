"""The record of a run: JSON lines and TensorBoard events."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from mtp_ext.train.metrics import finite

METRICS_FILE = "metrics.jsonl"


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the records of a metrics file, without a last line truncated by a kill."""
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            return


class MetricsWriter:
    """Appends records to a run's `metrics.jsonl` and mirrors their numbers to TensorBoard.

    A record is a flat dict with ``kind`` ("train", "validation"), ``step`` and numbers or lists of one number per head.
    Resuming first drops the records after ``resumed_step``, because the run repeats those steps.

    Args:
        directory: The run's directory; None records nothing, in a process that is not the main one.
        resumed_step: The step that the run continues from; 0 for a new run.
        tensorboard: Whether to write event files to `<directory>/tensorboard`.
    Raises:
        ValueError: TensorBoard cannot write to the directory's path.
    """

    def __init__(self, directory: Path | None, *, resumed_step: int = 0, tensorboard: bool = True) -> None:
        self._file: TextIO | None = None
        self._board: Any = None
        if directory is None:
            return
        path = directory / METRICS_FILE
        kept = [record for record in read_metrics(path) if record["step"] <= resumed_step]
        replacement = path.with_suffix(".tmp")
        replacement.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
        os.replace(replacement, path)
        self._file = path.open("a", encoding="utf-8", buffering=1)  # line-buffered: a kill loses at most one record
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            if str(directory).encode(errors="replace") != os.fsencode(directory):
                raise ValueError(
                    f"out: TensorBoard writes to paths in UTF-8 only, got {str(directory)!r}; pass another --out, or "
                    "--logging.no-tensorboard"
                )
            purge = resumed_step + 1 if resumed_step else None
            self._board = SummaryWriter(str(directory / "tensorboard"), purge_step=purge)

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Appends a record."""
        if self._file is None:
            return
        record = finite({"kind": kind, "step": step, **values})
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        if self._board is None:
            return
        for name, value in values.items():
            for suffix, number in _numbers(value):
                self._board.add_scalar(f"{kind}/{name}{suffix}", number, step)

    def close(self) -> None:
        """Flushes and closes both."""
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(*([] if kind is None else [OSError])):  # never hides the error that ended the run
            self.close()


def _numbers(value: Any) -> Iterator[tuple[str, float]]:
    """Yields the scalars of a value with their name suffixes: itself, or one per head."""
    if isinstance(value, list):
        for k, number in enumerate(value, start=1):
            if number is not None:
                yield f"/head{k}", number
    elif isinstance(value, (int, float)):
        yield "", value
