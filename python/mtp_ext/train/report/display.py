"""What a run shows while it trains: a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskProgressColumn, TextColumn
from rich.text import Text

PLAIN_INTERVAL_SECONDS = 15.0


def format_duration(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


class _TimeLeftColumn(ProgressColumn):
    """Seconds left as the run itself estimates them."""

    def render(self, task: Task) -> Text:
        left = task.fields.get("left")
        return Text("-:--" if left is None else f"{format_duration(left)} left", style="progress.remaining")


class Display:
    """Shows progress on a console.

    Args:
        console: Where to; a bar if it is a terminal, else a line now and then.
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
        """Shows how much of the run is done (``[0, 1]``), the time left, and a line of numbers."""
        if self._bar is not None:
            self._bar.update(self._task, completed=fraction, status=status, left=seconds_left)
        elif time.monotonic() >= self._next_line:
            left = "" if seconds_left is None else f", {format_duration(seconds_left)} left"
            self.say(f"{fraction:4.0%}{left}  {status}")
            self._next_line = time.monotonic() + PLAIN_INTERVAL_SECONDS

    def say(self, message: str) -> None:
        """A line that stays."""
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
