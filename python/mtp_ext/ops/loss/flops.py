"""FLOP formulas of the operators, for :class:`torch.utils.flop_counter.FlopCounterMode`.

A row costs ``2 D V`` per product: one with the unembedding and one for each of the two gradients. Rows without a target
cost nothing; with fake tensors, whose values are unknown, every row counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from mtp_ext.ops.loss import operators
from mtp_ext.ops.loss.arguments import LossCall
from mtp_ext.ops.loss.native_cpu import FLAG_HIDDEN, FLAG_WEIGHT
from mtp_ext.ops.loss.row_kernels import prepared, select_rows

_ops = torch.ops.mtp_ext


def _flop(call: LossCall, weight: Tensor, n_products: int) -> int:
    vocab_size, width = weight.shape[-2:]
    try:
        rows = int(select_rows(prepared(call), vocab_size).counts.sum())
    except (NotImplementedError, RuntimeError):  # tensors without values
        rows = call.n_heads * call.rows_per_head
    return 2 * n_products * rows * vocab_size * width


@register_flop_formula([_ops._multi_token_loss, _ops._row_losses, _ops._row_losses_backward], get_raw=True)
def _(hidden: Sequence[Tensor], weight: Tensor, *call_and_needs: Any, out_val: Any = None) -> int:
    call, needs = operators.split(call_and_needs)
    return _flop(call, weight, 1 + needs.hidden + needs.weight)


@register_flop_formula(_ops._few_rows)
def _(x_shape: torch.Size, weight_shape: torch.Size, out_shape: Any = None, **_: Any) -> int:
    return 2 * x_shape[0] * weight_shape.numel()


@register_flop_formula(_ops._fused_loss_, get_raw=True)
def _(
    hidden: Sequence[Tensor],
    weight: Tensor,
    tensors: Sequence[Tensor],
    options: Sequence[float],
    sizes: Sequence[int],
    compute_dtype: torch.dtype,
    flags: int,
    sums: Sequence[Tensor],
    out_val: Any = None,
) -> int:
    labels, seq_len = tensors[0], sizes[0]
    if seq_len < 0:  # targets of any shape
        labels, seq_len = labels.reshape(1, -1), labels.numel()
    document_ids, token_weights = (*tensors[1:3], None, None)[:2]
    call = LossCall(
        labels=labels,
        seq_len=seq_len,
        n_heads=sizes[1],
        first_shift=sizes[2],
        compute_dtype=compute_dtype,
        document_ids=document_ids,
        token_weights=token_weights,
        ignore_index=sizes[3],
    )
    return _flop(call, weight, 1 + bool(flags & FLAG_HIDDEN) + bool(flags & FLAG_WEIGHT))
