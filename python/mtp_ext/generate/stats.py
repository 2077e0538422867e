"""Decoding statistics: the measures of speculative decoding, under vLLM's names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class DecodingStats:
    """Counts of one call of :func:`mtp_ext.generate.generate`. A round is one forward of one unfinished row, after that
    of the prompt.

    Attributes:
        n_forward: Forwards of the model, including that of the prompt.
        n_tokens: Tokens emitted, over all rows.
        n_drafted: Tokens drafted and verified, over all rows.
        histogram: ``histogram[i]`` is the number of rounds that accepted ``i`` drafts, ``i = 0..`` drafts per round.
            Drafts beyond a row's end count, if they would have been accepted.
        n_first: Tokens that the prompt's forward gave: one for each row.
        rows: The same for each row alone.
        n_draft: The drafts per round that ``n_draft="auto"`` chose in the end, over all rows; else those that were
            asked for. None for a row.
        seconds: Where the time went, by part: "prompt", its forward; "auto", rounds that were only measured; and of the
            rounds "trunk", "heads", "unembedding" with the choice of tokens, and "host", the rest. Empty for a row,
            and on a GPU, which would have to be waited for.
    """

    n_forward: int
    n_tokens: int
    n_drafted: int
    histogram: tuple[int, ...]
    n_first: int = 0
    rows: tuple[DecodingStats, ...] = ()
    n_draft: int | None = None
    seconds: dict[str, float] = field(default_factory=dict, compare=False)

    @staticmethod
    def of_rows(rows: Sequence[DecodingStats]) -> DecodingStats:
        """Sums the rows of a batch, which share their forwards."""
        return DecodingStats(
            n_forward=max(row.n_forward for row in rows),
            n_tokens=sum(row.n_tokens for row in rows),
            n_drafted=sum(row.n_drafted for row in rows),
            histogram=tuple(map(sum, zip(*(row.histogram for row in rows), strict=True))),
            n_first=sum(row.n_first for row in rows),
            rows=tuple(rows),
        )

    @property
    def n_accepted(self) -> int:
        """Drafts accepted, over all rows."""
        return sum(i * count for i, count in enumerate(self.histogram))

    @property
    def tokens_per_forward(self) -> float:
        """Mean tokens per round (per row, independent of the batch size); 0 without rounds."""
        return _ratio(self.n_tokens - self.n_first, sum(self.histogram))

    @property
    def mean_acceptance_length(self) -> float:
        """1 + accepted drafts per round: 1 for ordinary decoding."""
        return 1.0 + _ratio(self.n_accepted, sum(self.histogram))

    @property
    def draft_acceptance_rate(self) -> float:
        """The fraction of drafts accepted; 0 without drafts."""
        return _ratio(self.n_accepted, self.n_drafted)

    @property
    def acceptance_rate_per_position(self) -> tuple[float, ...]:
        """The fraction of rounds that accepted the draft at each position; empty for ordinary decoding."""
        n_rounds = sum(self.histogram)
        return tuple(_ratio(sum(self.histogram[i:]), n_rounds) for i in range(1, len(self.histogram)))


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
