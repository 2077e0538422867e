"""Typed wrappers of the native row operators and their fake implementations. Not differentiable by themselves."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mtp_ext.ops.common import checks
from mtp_ext.ops.common.backend import backend_of
from mtp_ext.ops.common.result import RowTables
from mtp_ext.ops.loss.arguments import LossCall


def prepared(call: LossCall) -> LossCall:
    """Returns ``call`` with its tensors in the kernels' layouts and dtypes; cheap if they are already.

    Raises:
        ValueError: The normalizer is not positive and finite, on the CPU or with debug checks.
    """
    acc, normalizer = call.acc_dtype, call.normalizer
    if isinstance(normalizer, Tensor):
        checks.check_positive("normalizer", normalizer)
    changes: dict[str, Any] = {
        "labels": call.labels if call.labels.stride(-1) == 1 else call.labels.contiguous(),
        "document_ids": None if call.document_ids is None else call.document_ids.contiguous(),
        "token_weights": _as(call.token_weights, acc),
        "head_weights": _as(call.head_weights, torch.float64),
        "normalizer": _as(normalizer, torch.float64) if isinstance(normalizer, Tensor) else normalizer,
        "bias": _as(call.bias, acc),
        "row_scale": _as(call.row_scale, acc),
        "lse_grad": _as(call.lse_grad, acc),
    }
    if call.options.class_weights is not None:
        class_weights = _as(call.options.class_weights, acc)
        changes["options"] = replace(call.options, class_weights=class_weights)
    changes = {name: x for name, x in changes.items() if x is not getattr(call, name)}
    return replace(call, **changes) if changes else call


def _as(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if x is None else x.detach().to(dtype).contiguous()


class SelectedRows(NamedTuple):
    """The rows with a target."""

    rows: Tensor  # [n * B * S] int64: the flat indices of rows with a target, ascending, then -1; or marked
    counts: Tensor  # [n] int64
    first_invalid: Tensor  # [1] int64: the flat index into labels of a target outside [0, vocab_size), or -1


def select_rows(call: LossCall, vocab_size: int, *, marked: bool = False) -> SelectedRows:
    """Selects the rows with a target of a prepared call, on its device.

    ``marked`` rows stay where they are: each holds its own index, or -1 without a target.
    """
    return SelectedRows._make(
        torch.ops.mtp_ext._select_rows(
            call.labels,
            call.document_ids,
            call.token_weights,
            call.n_heads,
            call.seq_len,
            call.first_shift,
            call.ignore_index,
            vocab_size,
            marked,
        )
    )


@torch.library.register_fake("mtp_ext::_select_rows")  # type: ignore[untyped-decorator]
def _(
    labels: Tensor,
    document_ids: Tensor | None,
    token_weights: Tensor | None,
    num_heads: int,
    seq_len: int,
    first_shift: int,
    ignore_index: int,
    vocab_size: int,
    marked: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    def empty(size: int) -> Tensor:
        return labels.new_empty(size, dtype=torch.int64)

    return empty(num_heads * labels.shape[0] * seq_len), empty(num_heads), empty(1)


ROW_STATISTICS = 6  # max, sum_others, target_logit, target_class_weight, weighted_sum, argmax (core/row_loss.h)


@dataclass(frozen=True)
class RowShard:
    """The two-stage form of a chunk of a sharded vocabulary: see ``Stage`` in ``csrc/core/loss_rows_params.h``."""

    vocab_start: int
    total_vocab: int
    statistics: Tensor  # [R, 6] float64
    local_max: Tensor  # [R] float64


@dataclass(frozen=True)
class RowScales:
    """Scales of the rows' gradients."""

    heads: Tensor  # [n], the weight of each head's rows
    class_weight_sum: float = 0.0  # over the whole vocabulary; its size without class weights
    class_weight_total: Tensor | None = None  # [1] float64, the same sum on a GPU, where reading it would sync


def loss_rows_(
    logits: Tensor,
    rows: Tensor,
    call: LossCall,
    scales: RowScales,
    tables: RowTables,
    *,
    write_gradient: bool,
    stage: str = "whole",
    shard: RowShard | None = None,
) -> None:
    """Fills the tables at ``rows`` from ``logits [R, V]``, and overwrites the logits with their gradient if asked.

    Without ``write_gradient`` the logits are scratch and left undefined. Shapes are those of ``csrc/cpu/loss_rows.h``.
    With a ``shard``, call stage ``"statistics"`` and then ``"gradient"``; else ``"whole"``.

    Args:
        call: Prepared (:func:`prepared`).
    """
    options = call.options
    backend_of(logits.device).loss_rows_(
        logits,
        rows,
        call.labels,
        [
            scales.heads,
            call.row_scale,
            call.lse_grad,
            call.token_weights,
            options.class_weights,
            call.bias,
            scales.class_weight_total,
        ],
        options.pack(),
        scales.class_weight_sum,
        [
            call.seq_len,
            call.first_shift,
            0 if shard is None else shard.vocab_start,
            logits.shape[1] if shard is None else shard.total_vocab,
        ],
        write_gradient,
        list(tables),
        stage,
        [] if shard is None else [shard.statistics, shard.local_max],
    )


@torch.library.register_fake("mtp_ext::_loss_rows_")  # type: ignore[untyped-decorator]
def _(logits: Tensor, rows: Tensor, labels: Tensor, *rest: object) -> None:
    return None
