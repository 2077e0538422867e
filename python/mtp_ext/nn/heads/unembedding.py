"""Unembeddings of heads that do not share one."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ReplicatedUnembedding(nn.Module):
    """``n`` matrices in one parameter, ``[n, V, D]`` (Gloeckle et al. 2024, appendix B: (d, nV) weights).

    Args:
        n_matrices: ``n``, or ``n - 1`` if head 1's is tied to the embedding.
        vocab_size: ``V``.
        width: ``D``.
    """

    def __init__(self, n_matrices: int, vocab_size: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_matrices, vocab_size, width))

    def extra_repr(self) -> str:
        return "n={}, V={}, D={}".format(*self.weight.shape)

    def all_with(self, first: Tensor | None) -> Tensor:
        """Returns ``[n, V, D]`` of all heads; a tied ``first [V, D]`` is prepended, which copies."""
        return self.weight if first is None else torch.cat([first[None], self.weight])
