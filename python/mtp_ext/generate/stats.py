"""Decoding statistics: the measures of speculative decoding, under vLLM's names."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DecodingStats:
    """Counts of one call of :func:`mtp_ext.generate.generate`. A step is one forward of one unfinished row.

    Attributes:
        n_forward: Forwards of the model, including that of the prompt.
        n_tokens: Tokens emitted, over all rows.
        n_drafted: Tokens drafted, over all rows.
        histogram: ``histogram[i]`` is the number of steps that accepted ``i`` drafts, ``i = 0..`` drafts per step.
    """

    n_forward: int
    n_tokens: int
    n_drafted: int
    histogram: tuple[int, ...]

    @property
    def n_accepted(self) -> int:
        """Drafts accepted, over all rows."""
        return sum(i * count for i, count in enumerate(self.histogram))

    @property
    def tokens_per_forward(self) -> float:
        """Mean tokens per step (per row, independent of the batch size); 0 without steps."""
        return _ratio(self.n_tokens, sum(self.histogram))

    @property
    def mean_acceptance_length(self) -> float:
        """1 + accepted drafts per step: 1 for ordinary decoding."""
        return 1.0 + _ratio(self.n_accepted, sum(self.histogram))

    @property
    def draft_acceptance_rate(self) -> float:
        """The fraction of drafts accepted; 0 without drafts."""
        return _ratio(self.n_accepted, self.n_drafted)

    @property
    def acceptance_rate_per_position(self) -> tuple[float, ...]:
        """The fraction of steps that accepted the draft at each position; empty for ordinary decoding."""
        n_steps = sum(self.histogram)
        return tuple(_ratio(sum(self.histogram[i:]), n_steps) for i in range(1, len(self.histogram)))


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
