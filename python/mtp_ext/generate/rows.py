"""The rows of a batch while they are decoded: their new tokens, where they end, and their statistics."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from mtp_ext.generate.stats import DecodingStats

OnTokens = Callable[[int, list[int]], None]


@dataclass
class Row:
    """One row: its new tokens and the counts of its rounds."""

    histogram: list[int]
    tokens: list[int] = field(default_factory=list)
    n_drafted: int = 0
    running: bool = True

    @property
    def stats(self) -> DecodingStats:
        """The row's statistics."""
        n_first = min(1, len(self.tokens))
        return DecodingStats(
            n_forward=n_first + sum(self.histogram),
            n_tokens=len(self.tokens),
            n_drafted=self.n_drafted,
            histogram=tuple(self.histogram),
            n_first=n_first,
        )


class Rows:
    """The rows of a batch.

    Args:
        n_rows: ``B``.
        n_draft: Drafts per row and round.
        max_new_tokens: Tokens after which a row ends.
        eos_token: Token with which a row ends.
        on_tokens: Called with a row's index and the tokens that a round adds to it.
    """

    def __init__(
        self, n_rows: int, n_draft: int, max_new_tokens: int, eos_token: int | None, on_tokens: OnTokens | None
    ) -> None:
        self.max_new_tokens, self.eos_token, self.on_tokens = max_new_tokens, eos_token, on_tokens
        self.rows = [Row([0] * (n_draft + 1)) for _ in range(n_rows)]

    @property
    def running(self) -> set[int]:
        """Indices of the rows that have not ended."""
        return {i for i, row in enumerate(self.rows) if row.running}

    @property
    def stats(self) -> DecodingStats:
        """The statistics of the batch."""
        return DecodingStats.of_rows([row.stats for row in self.rows])

    def add(self, tokens: list[list[int]], n_drafted: int) -> None:
        """Adds one forward's tokens to the rows that are running.

        Args:
            tokens: Of each row, the drafts that were accepted and the token after them.
            n_drafted: The number of drafts of each row.
        """
        for i in sorted(self.running):
            row, new = self.rows[i], tokens[i]
            if row.tokens:  # the prompt's forward is no round
                row.histogram[len(new) - 1] += 1
                row.n_drafted += n_drafted
            if self.eos_token in new:
                new = new[: new.index(self.eos_token) + 1]
            new = new[: self.max_new_tokens - len(row.tokens)]
            row.tokens += new
            row.running = len(row.tokens) < self.max_new_tokens and new[-1] != self.eos_token
            if self.on_tokens is not None:
                self.on_tokens(i, new)
