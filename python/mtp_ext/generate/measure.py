"""Measures decoding: tokens per forward, acceptance of each draft, time of a round; without and with drafts in turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from mtp_ext.generate.decoding import GenerationOutput, SamplingKeywords, generate
from mtp_ext.generate.stats import DecodingStats
from mtp_ext.nn.evaluation_mode import evaluation_mode
from mtp_ext.nn.multi_token_model import MultiTokenModel

if TYPE_CHECKING:
    from typing_extensions import Unpack

CONFIDENCE, RESAMPLES = 0.95, 2000
INTERVAL = f"{CONFIDENCE:.0%}, percentile bootstrap over prompts, {RESAMPLES} resamples"
WARM_UP_TOKENS = 4

Drafting = int | str | tuple[int, ...] | None
"""``n_draft``, or ``tree`` where it is a tuple."""


class Estimate(NamedTuple):
    """A ratio, and its confidence interval (`INTERVAL`); NaN where nothing was counted, and at one prompt's limits."""

    value: float
    low: float
    high: float


def estimate(parts: Tensor, wholes: Tensor) -> Estimate:
    """Estimates ``sum(parts) / sum(wholes)``.

    Prompts are drawn with replacement, each with all its rounds, because rounds of one text resemble each other.

    Args:
        parts: ``[P]`` float64, the numerator of each prompt.
        wholes: ``[P]``, its denominator.
    """
    value = float(parts.sum() / wholes.sum())
    if len(parts) < 2:
        return Estimate(value, torch.nan, torch.nan)
    drawn = torch.randint(len(parts), (RESAMPLES, len(parts)), generator=torch.Generator().manual_seed(0))
    ratios = parts[drawn].sum(1) / wholes[drawn].sum(1)
    tail = (1 - CONFIDENCE) / 2
    low, high = ratios.nanquantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return Estimate(value, low, high)


class RoundClock:
    """Notes when each round ends, as the ``on_tokens`` of one call of :func:`mtp_ext.generate.generate`."""

    def __init__(self) -> None:
        self._ends: list[float] = []
        self._row = 0

    def __call__(self, row: int, tokens: list[int]) -> None:
        if not self._ends or row <= self._row:  # rows are reported in ascending order within a forward
            self._ends.append(time.perf_counter())
        self._row = row

    @property
    def seconds(self) -> list[float]:
        """The seconds of each forward after that of the prompts."""
        return [end - start for start, end in pairwise(self._ends)]


@dataclass
class DecodingMeasurement:
    """What decoding some prompts with one number of drafts gave.

    Attributes:
        rows: Counts of each prompt.
        texts: New tokens of each prompt.
        round_seconds: Seconds of each forward of a batch, after that of its prompts.
        tree: Numbers of drafts by position; empty for one at each.
    """

    rows: list[DecodingStats] = field(default_factory=list)
    texts: list[list[int]] = field(default_factory=list)
    round_seconds: list[float] = field(default_factory=list)
    tree: tuple[int, ...] = ()

    def add(self, output: GenerationOutput, round_seconds: Sequence[float]) -> None:
        """Adds a batch."""
        self.rows += output.stats.rows
        self.texts += [tokens.tolist() for tokens in output.tokens]
        self.round_seconds += round_seconds

    @property
    def n_draft(self) -> int:
        """Drafts per round."""
        return max(len(row.histogram) for row in self.rows) - 1

    @property
    def n_new(self) -> int:
        """Tokens that the rounds emitted: all but the first of each prompt."""
        return sum(row.n_tokens - row.n_first for row in self.rows)

    @property
    def tokens_per_forward(self) -> Estimate:
        """Mean tokens of a prompt's round."""
        return estimate(_column(row.n_tokens - row.n_first for row in self.rows), self._at_least(0))

    @property
    def acceptance_per_position(self) -> list[Estimate]:
        """The fraction of all rounds that accepted the first draft, the second, ..."""
        return [estimate(self._at_least(i), self._at_least(0)) for i in range(1, self.n_draft + 1)]

    @property
    def conditional_acceptance(self) -> list[Estimate]:
        """The same, of the rounds that accepted the drafts before it."""
        return [estimate(self._at_least(i), self._at_least(i - 1)) for i in range(1, self.n_draft + 1)]

    @property
    def seconds_per_round(self) -> float:
        """Median seconds of a forward; NaN without any."""
        return statistics.median(self.round_seconds) if self.round_seconds else float("nan")

    @property
    def tokens_per_second(self) -> float:
        """Tokens of a batch per second of its rounds, at their median time, without the forward of the prompts."""
        return self.n_new / (len(self.round_seconds) or 1) / self.seconds_per_round

    def _at_least(self, n_accepted: int) -> Tensor:
        """Each prompt's rounds that accepted at least so many drafts."""
        return _column(sum(row.histogram[n_accepted:]) for row in self.rows)

    def same_texts(self, other: DecodingMeasurement) -> int:
        """Counts the prompts to which both gave the same tokens."""
        return sum(mine == theirs for mine, theirs in zip(self.texts, other.texts, strict=True))

    def as_dict(self) -> dict[str, Any]:
        """Returns the numbers as a record."""
        return {
            "n_draft": self.n_draft,
            "tree": list(self.tree),
            "n_prompts": len(self.rows),
            "n_tokens": sum(row.n_tokens for row in self.rows),
            "n_rounds": sum(sum(row.histogram) for row in self.rows),
            "tokens_per_forward": self.tokens_per_forward._asdict(),
            "acceptance_per_position": [rate._asdict() for rate in self.acceptance_per_position],
            "conditional_acceptance_per_position": [rate._asdict() for rate in self.conditional_acceptance],
            "interval": INTERVAL,
            "seconds_per_round": self.seconds_per_round,
            "tokens_per_second": self.tokens_per_second,
        }


def measure_decoding(
    model: MultiTokenModel,
    prompts: Tensor | Sequence[Tensor],
    max_new_tokens: int,
    n_drafts: Sequence[Drafting],
    *,
    batch_size: int = 1,
    seconds: float = float("inf"),
    seed: int = 0,
    **options: Unpack[SamplingKeywords],
) -> list[DecodingMeasurement]:
    """Decodes every batch of prompts with each number of drafts in turn, so that drifts of the machine affect all.

    Args:
        model: The model, on its device; its training mode is restored.
        prompts: ``P`` 1-d tensors of token ids, or ``[P, S]``.
        max_new_tokens: Maximum number of tokens to add to each.
        n_drafts: Numbers of drafts, as :func:`mtp_ext.generate.generate` takes them; a tuple is a ``tree``.
        batch_size: Prompts per batch; those that do not fill the last batch are one of their own.
        seconds: Begins no further batch after this time; the first is always decoded.
        seed: Seed of the first batch's random numbers.
        options: Further arguments of `generate`: :class:`mtp_ext.generate.decoding.SamplingKeywords`.
    Returns:
        The measurement of each element of ``n_drafts``.
    Raises:
        TypeError, ValueError: As for `generate`.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    device = next(model.parameters()).device
    with evaluation_mode(model):
        for n_draft in n_drafts:
            generate(model, prompts[:1], min(WARM_UP_TOKENS, max_new_tokens), **_drafting(n_draft), **options)
        found = [DecodingMeasurement(tree=n_draft if isinstance(n_draft, tuple) else ()) for n_draft in n_drafts]
        started = time.perf_counter()
        for first in range(0, len(prompts), batch_size):
            if first and time.perf_counter() - started > seconds:
                break
            for n_draft, measurement in zip(n_drafts, found, strict=True):
                clock, generator = RoundClock(), torch.Generator(device).manual_seed(seed + first)
                given = {**_drafting(n_draft), "generator": generator, "on_tokens": clock}
                batch = prompts[first : first + batch_size]
                measurement.add(generate(model, batch, max_new_tokens, **given, **options), clock.seconds)
    return found


def _drafting(n_draft: Drafting) -> dict[str, Any]:
    return {"tree" if isinstance(n_draft, tuple) else "n_draft": n_draft}


def _column(counts: Iterable[int]) -> Tensor:
    """Makes a float64 tensor of one count per prompt."""
    return torch.tensor([*counts], dtype=torch.float64)
