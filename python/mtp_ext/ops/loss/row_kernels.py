"""The native row ops with Python types, and their shapes for tracing. Not differentiable by themselves."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RowOptions:
    """How one row's logits become a loss; the defaults are plain cross-entropy. See ``csrc/core/row_loss.h``."""

    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float = 0.0  # 0: none
    logit_scale: float = 1.0


@dataclass(frozen=True)
class RowTargets:
    """Where the rows' targets are: row ``(k, b, s)`` predicts ``labels[b, s + first_shift + k]``."""

    labels: Tensor  # [B, label_len] int32 or int64, unit stride
    document_ids: Tensor | None  # [B, label_len]
    token_weights: Tensor | None  # [B, label_len] float32, contiguous
    seq_len: int
    first_shift: int

    @staticmethod
    def of(
        labels: Tensor, document_ids: Tensor | None, token_weights: Tensor | None, seq_len: int, first_shift: int
    ) -> RowTargets:
        """From tensors of any layout and dtype that the losses take."""
        return RowTargets(
            labels if labels.stride(-1) == 1 or labels.shape[-1] <= 1 else labels.contiguous(),
            None if document_ids is None else document_ids.contiguous(),
            None if token_weights is None else token_weights.detach().float().contiguous(),
            seq_len,
            first_shift,
        )

    @property
    def rows_per_head(self) -> int:
        return self.labels.shape[0] * self.seq_len


def select_rows(
    targets: RowTargets, n_heads: int, *, ignore_index: int, vocab_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The rows that carry a target.

    Returns:
        ``rows`` ``[n * B * S]`` int64 (the flat indices of those that count, ascending, then -1), ``counts``
        ``[n]`` int64, and ``first_invalid`` ``[1]`` int64: the flat index into ``labels`` of a target outside
        ``[0, vocab_size)``, or -1.
    """
    selected: tuple[Tensor, Tensor, Tensor] = torch.ops.mtp_ext._select_rows(
        targets.labels,
        targets.document_ids,
        targets.token_weights,
        n_heads,
        targets.seq_len,
        targets.first_shift,
        ignore_index,
        vocab_size,
    )
    return selected


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
) -> tuple[Tensor, Tensor, Tensor]:
    def empty(size: int) -> Tensor:
        return labels.new_empty(size, dtype=torch.int64)

    return empty(num_heads * labels.shape[0] * seq_len), empty(num_heads), empty(1)


@dataclass(frozen=True)
class RowTables:
    """Per-row outputs over all flat rows ``[n * B * S]``; rows that do not count keep 0, 0 and -1."""

    loss: Tensor  # float32 (float64 for float64 logits), without the row's weight
    lse: Tensor
    predicted: Tensor  # int32, the argmax

    @staticmethod
    def zeros(n_rows: int, dtype: torch.dtype, device: torch.device) -> RowTables:
        loss = torch.zeros(n_rows, dtype=dtype, device=device)
        return RowTables(loss, torch.zeros_like(loss), torch.full((n_rows,), -1, dtype=torch.int32, device=device))


ROW_STATISTICS = 6  # max, sum_others, target_logit, target_class_weight, weighted_sum, argmax (core/row_loss.h)


@dataclass(frozen=True)
class RowShard:
    """The two-stage form of a chunk whose vocabulary is sharded: see ``Stage`` in ``csrc/cpu/loss_rows.h``."""

    vocab_start: int
    total_vocab: int
    statistics: Tensor  # [R, 6] float64
    local_max: Tensor  # [R] float64


def loss_rows_(
    logits: Tensor,
    rows: Tensor,
    targets: RowTargets,
    tables: RowTables,
    *,
    head_scale: Tensor,
    options: RowOptions,
    row_scale: Tensor | None = None,
    lse_grad: Tensor | None = None,
    class_weights: Tensor | None = None,
    class_weight_sum: float = 0.0,
    class_weight_total: Tensor | None = None,
    bias: Tensor | None = None,
    write_gradient: bool,
    stage: str = "whole",
    shard: RowShard | None = None,
) -> None:
    """Fills the tables at ``rows`` from ``logits [R, V]``, and overwrites the logits with their gradient if asked.

    Without ``write_gradient`` the logits are scratch and left undefined. Shapes are those of ``csrc/cpu/loss_rows.h``.
    With a ``shard``, stage ``"statistics"`` and then ``"gradient"``; else ``"whole"``.
    """
    torch.ops.mtp_ext._loss_rows_(
        logits,
        rows,
        targets.labels,
        head_scale,
        row_scale,
        lse_grad,
        targets.token_weights,
        class_weights,
        bias,
        targets.seq_len,
        targets.first_shift,
        options.label_smoothing,
        options.z_loss,
        class_weight_sum,
        options.softcap,
        options.logit_scale,
        write_gradient,
        tables.loss,
        tables.lse,
        tables.predicted,
        stage,
        0 if shard is None else shard.vocab_start,
        None if shard is None else shard.total_vocab,
        None if shard is None else shard.statistics,
        None if shard is None else shard.local_max,
        class_weight_total,
    )


@torch.library.register_fake("mtp_ext::_loss_rows_")  # type: ignore[untyped-decorator]
def _(logits: Tensor, rows: Tensor, labels: Tensor, *rest: object) -> None:
    return None
