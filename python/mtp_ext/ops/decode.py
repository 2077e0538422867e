"""The best classes of a few hidden rows under the unembedding: what decoding needs of the logits."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Of the decoding kernel (csrc/kernels/decode.h); other calls are a GEMM.
LARGEST_ROWS = 64
LARGEST_TOP = 16


class TopClasses(NamedTuple):
    """The ``k`` largest logits of each row, largest first, of equals the lowest class; ``ids[:, 0]`` is the argmax."""

    logits: Tensor  # [R, k] float32
    ids: Tensor  # [R, k] int64
    lse: Tensor  # [R] float32, the log-sum-exp over all classes


def top_classes(hidden: Tensor, weight: Tensor, k: int = 1) -> TopClasses:
    """``topk(hidden @ weight.T)`` and its log-sum-exp; on a GPU, for up to 64 rows in 16 bits, without the logits.

    Args:
        hidden: ``[R, D]``; the rows of ``n`` heads that share the unembedding are rows of one call.
        weight: ``[V, D]``, of ``hidden``'s dtype.
        k: At most ``V``.
    """
    if k > weight.shape[0]:
        raise ValueError(f"k must be at most V = {weight.shape[0]}, got {k}")
    if uses_kernel(hidden, weight, k):
        logits, ids, lse = torch.ops.mtp_ext._decode(hidden.contiguous(), weight.contiguous(), k)
        return TopClasses(logits, ids.long(), lse)
    scores = torch.mm(hidden, weight.t()).float()
    order = scores.sort(dim=-1, descending=True, stable=True)  # stable: topk leaves the order of equals open
    return TopClasses(order.values[:, :k], order.indices[:, :k], scores.logsumexp(-1))


def uses_kernel(hidden: Tensor, weight: Tensor, k: int) -> bool:
    """Whether the one-pass kernel takes the call."""
    return (
        hidden.is_cuda
        and hidden.dtype == weight.dtype
        and hidden.dtype.itemsize == 2
        and hidden.shape[0] <= LARGEST_ROWS
        and k <= LARGEST_TOP
        and hidden.shape[1] % 8 == 0
    )


@torch.library.register_fake("mtp_ext::_decode")  # type: ignore[untyped-decorator]
def _(hidden: Tensor, weight: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor]:
    rows = hidden.shape[0]
    logits = hidden.new_empty((rows, top), dtype=torch.float32)
    return logits, hidden.new_empty((rows, top), dtype=torch.int32), hidden.new_empty(rows, dtype=torch.float32)
