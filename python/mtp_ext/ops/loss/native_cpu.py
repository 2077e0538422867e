"""The loss of all heads on the CPU as one native call, for the bodies of :mod:`mtp_ext.ops.loss.operators`.

:class:`mtp_ext.ops.loss.accumulator.HeadLossAccumulator` does the same a step at a time: for heads that come one by
one, for devices whose row counts no host sees, and for sharded vocabularies.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mtp_ext.ops.common import checks, metrics
from mtp_ext.ops.common.workspace import empty, workspace
from mtp_ext.ops.loss.arguments import saved_grad_dtype
from mtp_ext.ops.loss.chunk_gemms import chunk_size, logits_dtype
from mtp_ext.ops.loss.row_kernels import RowTargets, select_rows


def takes(weight: Tensor, group_name: str | None) -> bool:
    """Whether a call is one for this module."""
    return weight.device.type == "cpu" and group_name is None


class FusedLoss(NamedTuple):
    """What one call gives; tables are over all rows ``(n, B, S)``, 0 and -1 where a row does not count."""

    loss: Tensor  # 0-d; results are float32, or float64 for float64 inputs
    head_loss: Tensor  # [n]
    n_valid: Tensor  # [n] int64
    denominators: Tensor  # [n], what each head's sum was divided by
    losses: Tensor  # [n, B, S], with its token weight
    lse: Tensor  # [n, B, S]
    predicted: Tensor  # [n, B, S] int32, the argmax
    grad_weight: Tensor | None
    grad_bias: Tensor | None
    grad_hidden: list[Tensor]  # in the form of hidden; empty if not asked for

    def metrics(self, labels: Tensor, first_shift: int) -> tuple[Tensor, Tensor]:
        """Top-1 of each head, and accept length."""
        seq_len = self.losses.shape[2]
        top1 = metrics.top1(self.predicted, labels, self.n_valid, seq_len=seq_len, first_shift=first_shift)
        return top1, metrics.acceptance_length(self.predicted)


def fused_loss(
    hidden: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    document_ids: Tensor | None,
    token_weights: Tensor | None,
    class_weights: Tensor | None,
    *,
    head_weights: Tensor | None = None,
    normalizer: float | None,
    row_scale: Tensor | None = None,
    lse_grad: Tensor | None = None,
    seq_len: int,
    n_heads: int,
    first_shift: int,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    logit_scale: float,
    detach_weight: Sequence[int],
    compute_dtype: torch.dtype,
    chunk_rows: int | None,
    workspace_bytes: int | None,
    max_valid: Sequence[int] | None,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> FusedLoss:
    """Loss, metrics and gradients of all heads.

    Args:
        hidden: The heads' ``[B, S, D]``, or one tensor ``[n, B, S, D]``.
        normalizer: What each head's sum is divided by; None: its sum of weights.
        others: As of :class:`mtp_ext.ops.loss.accumulator.HeadLossAccumulator`.
    Raises:
        ValueError: A target outside ``[0, V)`` that is not ``ignore_index``, or more targets than ``max_valid``.
    """
    targets = RowTargets.of(labels, document_ids, token_weights, seq_len, first_shift)
    wide = torch.float64 if compute_dtype == torch.float64 else torch.float32
    device, vocab_size, n_rows = weight.device, weight.shape[-2], labels.shape[0] * seq_len
    if max_valid is not None:
        _, n_valid, _ = select_rows(targets, n_heads, ignore_index=ignore_index, vocab_size=vocab_size)
        checks.check_max_valid(n_valid, max_valid)
    logits = logits_dtype(device, compute_dtype)
    grads = [empty(h.shape, saved_grad_dtype(h), device) for h in hidden] if need_hidden else []
    grad_weight = empty(weight.shape, wide, device) if need_weight else None
    grad_bias = torch.zeros(vocab_size, dtype=wide) if need_bias else None
    rows = chunk_size(
        n_rows if weight.dim() == 3 else n_heads * n_rows,
        vocab_size,
        logits.itemsize,
        chunk_rows=chunk_rows,
        workspace_bytes=workspace_bytes,
    )
    with workspace((rows, vocab_size), logits, device) as chunk:
        *outputs, first_invalid = torch.ops.mtp_ext._fused_loss_(
            _rows_of_heads(hidden, n_heads, n_rows),
            weight,
            _contiguous(bias, wide),
            targets.labels,
            targets.document_ids,
            targets.token_weights,
            _contiguous(class_weights, torch.float32),
            _contiguous(head_weights, torch.float64),
            _contiguous(row_scale, wide),
            _contiguous(lse_grad, wide),
            normalizer,
            seq_len,
            first_shift,
            ignore_index,
            label_smoothing,
            z_loss,
            softcap,
            logit_scale,
            detach_weight,
            compute_dtype,
            chunk,
            _rows_of_heads(grads, n_heads, n_rows),
            grad_weight,
            grad_bias,
        )
    checks.check_first_invalid(first_invalid, labels, vocab_size, ignore_index)
    shape = (n_heads, labels.shape[0], seq_len)
    loss, head_loss, n_valid, denominators, *tables = outputs
    losses, lse, predicted = (table.view(shape) for table in tables)
    return FusedLoss(loss, head_loss, n_valid, denominators, losses, lse, predicted, grad_weight, grad_bias, grads)


def _rows_of_heads(hidden: Sequence[Tensor], n_heads: int, n_rows: int) -> list[Tensor]:
    """``n`` tensors ``[B * S, D]``."""
    if hidden and hidden[0].dim() == 4:
        return list(hidden[0].reshape(n_heads, n_rows, hidden[0].shape[-1]).unbind())
    return [h.reshape(n_rows, h.shape[-1]) for h in hidden]


def _contiguous(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if x is None else x.detach().to(dtype).contiguous()


@torch.library.register_fake("mtp_ext::_fused_loss_")  # type: ignore[untyped-decorator]
def _(hidden: Sequence[Tensor], weight: Tensor, *rest: object) -> tuple[Tensor | int, ...]:
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    n, n_rows = len(hidden), hidden[0].shape[0]

    def new(*shape: int, dtype: torch.dtype = wide) -> Tensor:
        return weight.new_empty(shape, dtype=dtype)

    tables = new(n * n_rows), new(n * n_rows), new(n * n_rows, dtype=torch.int32)
    return new(), new(n), new(n, dtype=torch.int64), new(n), *tables, -1
