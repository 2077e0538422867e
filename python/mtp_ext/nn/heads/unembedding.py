"""Replicated unembeddings, and which modules can be an unembedding."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mtp_ext.nn.schedules.fsdp import sharded_modules
from mtp_ext.nn.transformer.checks import is_watched

# Modules whose output is x W^T + b, or that have no forward. FSDP2 and parametrizations inherit these.
_FORWARDS = (nn.Linear.forward, nn.Embedding.forward, nn.Module.forward)


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


def check_linear_map(unembed: nn.Module) -> None:
    """Raises TypeError unless ``unembed`` is the linear map of its weight and bias; its forward is not called."""
    expected = "unembed must be a linear map of its weight and bias, such as nn.Linear (its forward is not called)"
    if type(unembed).forward not in _FORWARDS:
        raise TypeError(
            f"{expected}. Got {type(unembed).__name__}, which has its own: merge what it adds into the weight (LoRA: "
            "merge_and_unload()), or compute the weight with torch.nn.utils.parametrize"
        )
    if is_watched(unembed) and not sharded_modules([unembed]):
        raise TypeError(f"{expected}. Got one with hooks or a replaced forward, which would be skipped: remove them")
