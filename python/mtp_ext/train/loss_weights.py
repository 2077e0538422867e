"""The weights of the heads' losses over a run."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

CURRICULA = ("none", "forward", "reverse")
Point = tuple[float, tuple[float, ...]]


class LossWeights:
    """The weight of each head after a fraction ``f`` of a run.

    Head ``k`` has ``head_weights[k] * discount ** (k - 1) * w_k(f) * on_k(f)``. ``w_k`` is piecewise linear through
    ``points``, and constant before the first and after the last. ``on_k`` is 1 or 0: a forward curriculum starts with
    head 1 and adds the next head after each ``1/n`` of the run, a reverse one starts with all heads and drops the last
    one after each ``1/n`` (Aynetdinov & Akbik 2025, arXiv 2505.22757). A head of weight 0 does not run.

    The object is part of the training state. The fraction never decreases: a run resumed with a higher limit keeps its
    current heads.

    Args:
        n_future: ``n``.
        head_weights: ``n`` factors; default 1, the paper's plain sum.
        discount: Geometric discount of later heads, positive; above 1 it favours them.
        points: ``(fraction, n factors)``, by ascending fraction in [0, 1].
        curriculum: "none", "forward" or "reverse".
    Raises:
        ValueError: A wrong number of factors, a negative or infinite one, unordered points, an unknown curriculum, or
            all weights 0 at some point of the run.
    """

    def __init__(
        self,
        n_future: int,
        *,
        head_weights: Sequence[float] | None = None,
        discount: float = 1.0,
        points: Sequence[Point] = (),
        curriculum: str = "none",
    ) -> None:
        if not (math.isfinite(discount) and discount > 0):
            raise ValueError(f"discount must be finite and positive, got {discount!r}")
        if curriculum not in CURRICULA:
            raise ValueError(f"curriculum must be one of {', '.join(CURRICULA)}, got {curriculum!r}")
        self.n_future, self.curriculum = n_future, curriculum
        given = [1.0] * n_future if head_weights is None else list(head_weights)
        _check_factors("head_weights", given, n_future)
        self.base = tuple(weight * discount**k for k, weight in enumerate(given))
        self.points = tuple((float(at), tuple(map(float, factors))) for at, factors in points)
        for at, factors in self.points:
            _check_factors("weight_points", factors, n_future)
            if not 0.0 <= at <= 1.0:
                raise ValueError(f"weight_points must be at fractions of the run in [0, 1], got {at!r}")
        fractions = [at for at, _ in self.points]
        if any(a >= b for a, b in itertools.pairwise(fractions)):
            raise ValueError(f"weight_points must be at ascending fractions of the run, got {fractions}")
        self.fraction = 0.0
        self._check_some_weight()

    @property
    def current(self) -> tuple[float, ...]:
        """The ``n`` current weights."""
        factors, heads = self._factors(), self.active_heads
        return tuple(w * f if k < heads else 0.0 for k, (w, f) in enumerate(zip(self.base, factors, strict=True)))

    @property
    def active_heads(self) -> int:
        """The number of heads that the curriculum currently trains, counted from head 1."""
        stage = min(self.n_future - 1, math.floor(self.fraction * self.n_future + 1e-9))  # 3 steps of 9 are a third
        return {"none": self.n_future, "forward": 1 + stage, "reverse": self.n_future - stage}[self.curriculum]

    def advance(self, fraction: float) -> tuple[float, ...]:
        """Advances to a fraction of the run, in [0, 1], and returns its weights."""
        self.fraction = max(self.fraction, min(1.0, fraction))
        return self.current

    def state_dict(self) -> dict[str, float]:
        """Returns the current fraction, for the checkpoint."""
        return {"fraction": self.fraction}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a :meth:`state_dict`."""
        self.fraction = float(state["fraction"])

    def _check_some_weight(self) -> None:
        """Raises ValueError if no head has a weight somewhere in the run: nothing would be trained there."""
        ends = {0.0, *(at for at, _ in self.points if at < 1), *(k / self.n_future for k in range(self.n_future))}
        ordered = [*sorted(ends), 1.0]
        for at in [*ordered[:-1], *((a + b) / 2 for a, b in itertools.pairwise(ordered))]:  # weights are linear between
            self.fraction = at
            if not any(self.current):
                raise ValueError(
                    f"head_weights, weight_points and curriculum must leave a positive weight, but all are 0 at "
                    f"{at:g} of the run"
                )
        self.fraction = 0.0

    def _factors(self) -> tuple[float, ...]:
        """Interpolates ``w_k`` of all heads."""
        if not self.points:
            return (1.0,) * self.n_future
        before = [p for p in self.points if p[0] <= self.fraction]
        after = [p for p in self.points if p[0] > self.fraction]
        if not before or not after:
            return (before[-1] if before else after[0])[1]
        (start, low), (end, high) = before[-1], after[0]
        share = (self.fraction - start) / (end - start)
        return tuple(a + share * (b - a) for a, b in zip(low, high, strict=True))


def parse_point(text: str) -> Point:
    """Parses a point: ``"0.5:1,1,0.5,0"`` gives the weights of four heads halfway through the run.

    Raises:
        ValueError: The text has another form.
    """
    at, colon, factors = text.partition(":")
    try:
        if not colon:
            raise ValueError
        return float(at), tuple(float(factor) for factor in factors.split(","))
    except ValueError:
        raise ValueError(
            f"weight_points must be like 0.5:1,1,0.5,0 (fraction: a weight per head), got {text!r}"
        ) from None


def _check_factors(name: str, factors: Sequence[float], n_future: int) -> None:
    if len(factors) != n_future:
        raise ValueError(f"{name} must have one weight per head (n_future={n_future}), got {tuple(factors)!r}")
    if not all(math.isfinite(f) and f >= 0 for f in factors):
        raise ValueError(f"{name} must be finite and not negative, got {tuple(factors)!r}")
