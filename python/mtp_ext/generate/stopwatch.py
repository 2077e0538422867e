"""Where the time of decoding goes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

PARTS = ("prompt", "auto", "trunk", "heads", "unembedding", "host")


@dataclass
class Stopwatch:
    """Seconds by part, from one reading of the clock to the next.

    Attributes:
        clock: Gives seconds; another one makes tests deterministic.
        seconds: What has been measured, by the names of :data:`PARTS`.
    """

    clock: Callable[[], float] = time.perf_counter
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))

    def __post_init__(self) -> None:
        self._last = self.clock()

    def lap(self, part: str) -> None:
        """Counts the time since the last reading for ``part``."""
        now = self.clock()
        self.seconds[part] += now - self._last
        self._last = now

    def lap_of_all(self, part: str) -> None:
        """Counts the time since the last reading, and what the parts of a round have so far, for ``part``."""
        self.lap(part)
        for of_round in PARTS[2:]:
            self.seconds[part] += self.seconds[of_round]
            self.seconds[of_round] = 0.0
