"""Run length and learning-rate schedule as functions of the progress only: a resumed run continues the same curve."""

from __future__ import annotations

import math
import signal
from dataclasses import asdict, dataclass
from typing import Literal


@dataclass(frozen=True)
class Limits:
    """The limits of a run, which ends at the first that it reaches. ``None`` is no limit; at least one is set.

    Attributes:
        max_steps: Optimiser steps.
        max_seconds: Wall-clock seconds of the training loop, over all resumed parts.
        max_tokens: Trained positions (tokens that the trunk has seen, including repeats).
    """

    max_steps: int | None = None
    max_seconds: float | None = None
    max_tokens: int | None = None


@dataclass
class Progress:
    """The progress of a run; saved with every checkpoint.

    Attributes:
        step: Optimiser steps done.
        tokens: Positions trained on.
        seconds: Wall-clock seconds spent in the training loop, over all parts of the run.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def fraction(self, limits: Limits) -> float:
        """Returns the largest fraction used of any limit, in ``[0, 1]``.

        With limits in steps or tokens only, it is the same on every machine; with one in seconds, the schedule follows
        the clock and always completes.
        """
        used = [
            done / limit
            for done, limit in (
                (self.step, limits.max_steps),
                (self.tokens, limits.max_tokens),
                (self.seconds, limits.max_seconds),
            )
            if limit is not None
        ]
        return min(1.0, max(used))

    def state_dict(self) -> dict[str, float]:
        """Returns the fields, for the checkpoint."""
        return asdict(self)


@dataclass(frozen=True)
class Ending:
    """How the loop ended.

    Attributes:
        received: The signal that stopped it; ``None`` at a limit.
        tokens_per_second: Positions trained on per second of training steps, without validations and checkpoints.
        memory_bytes: Peak memory of the process (on a GPU: of its allocator).
    """

    received: signal.Signals | None
    tokens_per_second: float
    memory_bytes: int


def learning_rate_factor(
    step: int, fraction: float, *, warmup_steps: int, decay_ratio: float, decay: Literal["cosine", "linear"] = "cosine"
) -> float:
    """Returns the learning rate of the next step as a fraction of its peak (Gloeckle et al. 2024, appendix M).

    ``min(1, (step + 1) / warmup_steps) * (decay_ratio + (1 - decay_ratio) * shape(fraction))``: a linear warmup times
    a decay over the whole run. The warmup counts steps and the decay the fraction of the run, because the number of
    steps within a time limit is not known at the start.

    Args:
        step: Steps already done.
        fraction: Fraction of the run that is done, in ``[0, 1]``.
        warmup_steps: Steps of linear warmup; 0 is none.
        decay_ratio: Factor at the end of the run.
        decay: Shape of the decay.
    """
    warmup = min(1.0, (step + 1) / warmup_steps) if warmup_steps > 0 else 1.0
    shape = 0.5 * (1.0 + math.cos(math.pi * fraction)) if decay == "cosine" else 1.0 - fraction
    return warmup * (decay_ratio + (1.0 - decay_ratio) * shape)
