"""Progress display of a run: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import os
import sys
import time
from contextlib import suppress
from types import TracebackType
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskProgressColumn, TextColumn
from rich.text import Text

PLAIN_INTERVAL_SECONDS = 15.0


def format_duration(seconds: float) -> str:
    """Formats seconds as m:ss or h:mm:ss."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def discard(stream: TextIO) -> None:
    """Redirects a stream that cannot be written to the null device, so that its last flush at exit succeeds."""
    with suppress(OSError, ValueError):  # a stream without a descriptor
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


def complain(message: str) -> None:
    """Prints a line on standard error, if that can be written."""
    try:
        print(message.encode(errors="backslashreplace").decode(), file=sys.stderr, flush=True)
    except (OSError, ValueError):
        discard(sys.stderr)


class LastingStream:
    """A text stream without errors: when writing fails, it says so on standard error and discards all further text.

    A long run thus outlives the terminal, the pipe or the full disk that shows it.

    Args:
        stream: Where the text goes.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._failed = stream, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Writes as a text stream does."""
        try:
            return len(text) if self._failed else self._stream.write(text)
        except OSError as error:
            self._fail(error)
            return len(text)

    def flush(self) -> None:
        """Flushes as a text stream does."""
        try:
            if not self._failed:
                self._stream.flush()
        except OSError as error:
            self._fail(error)

    def _fail(self, error: OSError) -> None:
        self._failed = True
        discard(self._stream)
        complain(f"mtp train: cannot write to standard output ({error.strerror}); training continues without display")


class _TimeLeftColumn(ProgressColumn):
    """The remaining time, as estimated by the run."""

    def render(self, task: Task) -> Text:
        left = task.fields.get("left")
        return Text("-:--" if left is None else f"{format_duration(left)} left", style="progress.remaining")


class Display:
    """Shows progress on a console.

    Args:
        console: The console to print to: a bar on a terminal, else occasional lines.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self._bar: Progress | None = None
        if console.is_terminal:
            self._bar = Progress(
                TextColumn("training"),
                BarColumn(bar_width=None),
                TaskProgressColumn(),
                _TimeLeftColumn(),
                TextColumn("{task.fields[status]}"),
                console=console,
            )
            self._task = self._bar.add_task("", total=1.0, status="", left=None)
        self._next_line = 0.0

    def update(self, fraction: float, seconds_left: float | None, status: str) -> None:
        """Shows the fraction of the run that is done, the remaining time and a status line."""
        if self._bar is not None:
            self._bar.update(self._task, completed=fraction, status=status, left=seconds_left)
        elif time.monotonic() >= self._next_line:
            left = "" if seconds_left is None else f", {format_duration(seconds_left)} left"
            self.say(f"{fraction:4.0%}{left}  {status}")
            self._next_line = time.monotonic() + PLAIN_INTERVAL_SECONDS

    def say(self, message: str) -> None:
        """Prints a permanent line."""
        self.console.print(message, highlight=False, markup=False, soft_wrap=True)

    def __enter__(self) -> Display:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
