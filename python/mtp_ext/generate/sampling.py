"""From logits to the next token: greedy, or by chance after temperature, top-k and top-p."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn.

    Args:
        temperature: Logits are divided by it; 0 takes the most likely token.
        top_k: Keep the ``k`` most likely tokens (exactly ``k``, ties by lower index).
        top_p: Of those, keep the fewest most likely ones whose probabilities sum to at least ``p`` (Holtzman et al.
            2020, arXiv 1904.09751).
    Raises:
        TypeError, ValueError: An argument out of range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not math.isfinite(self.temperature) or self.temperature < 0:
            raise ValueError(f"temperature must be finite and not negative, got {self.temperature}")
        if self.top_k is not None:
            if isinstance(self.top_k, bool) or not isinstance(self.top_k, int):
                raise TypeError(f"top_k must be an int or None, got {self.top_k!r}")
            if self.top_k < 1:
                raise ValueError(f"top_k must be at least 1, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")

    def probabilities(self, logits: Tensor) -> Tensor:
        """``[..., V]``: what a draw follows; one-hot at temperature 0. float32, or float64 for float64 logits."""
        logits = logits if logits.dtype == torch.float64 else logits.float()
        if self.temperature == 0:
            return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
        # The greatest logit goes first, so that a tiny temperature makes no infinity.
        logits = (logits - logits.amax(-1, keepdim=True)) / self.temperature
        if self.top_k is None and self.top_p is None:
            return logits.softmax(-1)
        ordered, index = logits.sort(stable=True, dim=-1, descending=True)
        if self.top_k is not None:
            ordered[..., self.top_k :] = -torch.inf
        kept = ordered.softmax(-1)
        if self.top_p is not None:
            before = kept.cumsum(-1) - kept  # a token stays while those ahead of it sum to less than p
            kept = kept.where(before < self.top_p, 0.0)
            kept = kept / kept.sum(-1, keepdim=True)
        return torch.zeros_like(kept).scatter_(-1, index, kept)

    def draw(self, logits: Tensor, generator: torch.Generator | None) -> Tensor:
        """One token for each row of ``logits [B, V]``: ``[B]`` int64."""
        if self.temperature == 0:
            return logits.argmax(-1)
        return torch.multinomial(self.probabilities(logits), 1, generator=generator)[:, 0]
