"""Top-k classes of a few hidden rows under the unembedding, for decoding."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mtp_ext.ops.common.backend import backend_of, can_read
from mtp_ext.ops.common.runtime import is_dtensor
from mtp_ext.ops.few_rows import linear

# Limits of the decoding kernel (csrc/kernels/decode.h); larger calls use a GEMM.
LARGEST_ROWS = 64
LARGEST_TOP = 16


class TopClasses(NamedTuple):
    """The ``k`` largest logits of each row in descending order; ties go to the lowest id. ``ids[:, 0]`` is the argmax.

    Logits are float32, or float64 for float64 inputs; the kernel never rounds them to 16 bits, a GEMM does.
    """

    logits: Tensor  # [R, k]
    ids: Tensor  # [R, k] int64
    lse: Tensor  # [R], the log-sum-exp over all classes


def top_classes(hidden: Tensor, weight: Tensor, k: int = 1) -> TopClasses:
    """Computes ``topk(hidden @ weight.T)`` and the log-sum-exp; up to 64 16-bit rows on a GPU never store the logits.

    Args:
        hidden: ``[R, D]``; heads that share the unembedding can share one call.
        weight: ``[V, D]`` in ``hidden``'s dtype.
        k: At most ``V``.
    Returns:
        :class:`TopClasses`; not differentiable.
    """
    _check_count(k, weight)
    if uses_kernel(hidden, weight, k):
        return _by_kernel(hidden, weight, k)
    scores = linear(hidden, weight)
    return TopClasses(*_largest(scores, k), _widened(scores).logsumexp(-1))


def largest_logits(hidden: Tensor, weight: Tensor, k: int = 1, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """:func:`top_classes` without the log-sum-exp, which takes 7 % more time outside the kernel.

    A ``bias [V]`` is added to the logits; the kernel has none, so that they are stored.
    """
    _check_count(k, weight)
    if bias is None and uses_kernel(hidden, weight, k):
        return _by_kernel(hidden, weight, k)[:2]
    return _largest(linear(hidden, weight, bias), k)


def _check_count(k: int, weight: Tensor) -> None:
    if not 1 <= k <= weight.shape[0]:
        raise ValueError(f"k must be at least 1 and at most V = {weight.shape[0]}, got {k}")


def uses_kernel(hidden: Tensor, weight: Tensor, k: int) -> bool:
    """Returns True if the one-pass kernel supports the call."""
    return (
        backend_of(hidden.device).has_kernels
        and hidden.dtype == weight.dtype
        and hidden.dtype in (torch.bfloat16, torch.float16)
        and not is_dtensor(hidden)
        and not is_dtensor(weight)
        and weight.device == hidden.device
        and weight.is_contiguous()
        and hidden.shape[0] <= LARGEST_ROWS
        and k <= LARGEST_TOP
        and hidden.shape[1] % 8 == 0
    )


def _by_kernel(hidden: Tensor, weight: Tensor, k: int) -> TopClasses:
    logits, ids, lse = backend_of(hidden.device).decode(hidden.contiguous(), weight, k)
    return TopClasses(logits, ids.long(), lse)


def _widened(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _largest(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` largest of each row and their columns; ties go to the lowest column: ``[R, V] -> 2 x [R, k]``."""
    if k == 1:
        best = scores.max(-1, keepdim=True)  # documented to return the first of equal maxima
        return _widened(best.values), best.indices
    if can_read(scores):
        values, classes = scores.topk(min(k + 1, scores.shape[1]))
        if not (values[:, 1:] == values[:, :-1]).any():  # topk does not specify the order of ties
            return _widened(values[:, :k]), classes[:, :k]
    order = scores.sort(dim=-1, descending=True, stable=True)
    return _widened(order.values[:, :k]), order.indices[:, :k]


@torch.library.register_fake("mtp_ext::_decode")  # type: ignore[untyped-decorator]
def _(hidden: Tensor, weight: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor]:
    rows = hidden.shape[0]
    logits = hidden.new_empty((rows, top), dtype=torch.float32)
    return logits, hidden.new_empty((rows, top), dtype=torch.int32), hidden.new_empty(rows, dtype=torch.float32)
