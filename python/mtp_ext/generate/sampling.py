"""Samples the next token from logits: greedy, or with temperature, top-k and top-p."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mtp_ext.ops.common.checks import check_int, check_number


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters.

    Args:
        temperature: Divides the logits; 0 takes the most likely token.
        top_k: Keep the ``k`` most likely tokens (exactly ``k``; ties go to the lowest index).
        top_p: Of those, keep the smallest set of most likely ones whose probabilities sum to at least ``p`` (Holtzman
            et al. 2020, arXiv 1904.09751).
    Raises:
        TypeError, ValueError: An argument out of range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        check_number("temperature", self.temperature)
        if not math.isfinite(self.temperature) or self.temperature < 0:
            raise ValueError(f"temperature must be finite and not negative, got {self.temperature}")
        if self.top_k is not None:
            check_int("top_k", self.top_k, " or None")
            if self.top_k < 1:
                raise ValueError(f"top_k must be at least 1, got {self.top_k}")
        if self.top_p is not None:
            check_number("top_p", self.top_p, " or None")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")

    @property
    def n_best(self) -> int | None:
        """The number of most likely tokens that a draw needs; None for all."""
        return 1 if self.temperature == 0 else self.top_k

    def probabilities(self, logits: Tensor) -> Tensor:
        """Returns the distribution ``[..., V]``, float32 or float64 as the logits; one-hot at temperature 0."""
        logits = logits if logits.dtype == torch.float64 else logits.float()
        if self.temperature == 0:
            return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
        if self.top_k is None and self.top_p is None:
            return self._scaled(logits).softmax(-1)
        ordered, index = logits.sort(stable=True, dim=-1, descending=True)
        return torch.zeros_like(logits).scatter_(
            -1, index[..., : self.top_k], self._of_best(ordered[..., : self.top_k])
        )

    def probabilities_of_best(self, logits: Tensor, classes: Tensor, vocab_size: int) -> Tensor:
        """Like :meth:`probabilities`, from the :attr:`n_best` largest logits ``[R, k]`` in descending order, and their
        ids; ``[R, V]``."""
        return logits.new_zeros(len(logits), vocab_size).scatter_(-1, classes, self._of_best(logits))

    def _of_best(self, ordered: Tensor) -> Tensor:
        """Computes the probabilities of the tokens kept by top-k, from their logits in descending order."""
        kept = self._scaled(ordered).softmax(-1)
        if self.top_p is None:
            return kept
        before = kept.cumsum(-1) - kept  # a token stays while the more likely ones sum to less than p
        kept = kept.where(before < self.top_p, 0.0)
        return kept / kept.sum(-1, keepdim=True)

    def _scaled(self, logits: Tensor) -> Tensor:
        """Divides by the temperature, after subtracting the maximum so that a tiny one does not overflow."""
        return (logits - logits.amax(-1, keepdim=True)) / self.temperature


def draw(weights: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draws one token from each row of ``weights [..., V]``, which need not sum to 1: ``[...]`` int64."""
    return torch.multinomial(weights.flatten(0, -2), 1, generator=generator).view(weights.shape[:-1])
