"""One call of a public loss: its arguments, checked, in the form that the Functions take."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mtp_ext.ops import checks
from mtp_ext.ops.head_loss import HeadLossAccumulator
from mtp_ext.ops.row_kernels import RowOptions


@dataclass(frozen=True)
class RowArguments:
    """The keyword arguments that both public losses share; the scalar options still unchecked."""

    bias: Tensor | None
    class_weights: Tensor | None
    token_weights: Tensor | None
    ignore_index: int
    reduction: str
    label_smoothing: float
    z_loss: float
    softcap: float | None
    logit_scale: float
    chunk_rows: int | None
    workspace_bytes: int | None
    grad_weight_out: Tensor | None
    group: torch.distributed.ProcessGroup | None

    def check(self, weight: Tensor, reductions: Collection[str]) -> None:
        """Raises TypeError or ValueError for the first argument that is wrong."""
        device, vocab_size = weight.device, weight.shape[-2]
        checks.check_vector("bias", self.bias, vocab_size, "V", checks.FLOAT_DTYPES, device)
        checks.check_vector("class_weights", self.class_weights, vocab_size, "V", checks.FLOAT_DTYPES, device)
        checks.check_options(self.label_smoothing, self.z_loss, self.softcap, self.logit_scale)
        checks.check_positive_int("chunk_rows", self.chunk_rows)
        checks.check_positive_int("workspace_bytes", self.workspace_bytes)
        checks.check_grad_weight_out(self.grad_weight_out, weight)
        if self.reduction not in reductions:
            raise ValueError(f"reduction must be one of {', '.join(reductions)}, got {self.reduction!r}")


@dataclass(frozen=True)
class LossCall:
    """What a Function needs beside its differentiable inputs."""

    labels: Tensor  # [B, S']
    seq_len: int
    n_heads: int
    first_shift: int
    stacked: bool  # hidden is one tensor [n, B, S, D]
    grad_weight_out: Tensor | None
    row: RowArguments
    compute_dtype: torch.dtype
    normalizer: str | float | Tensor = "per_head"
    document_ids: Tensor | None = None
    detach_weight: frozenset[int] = field(default_factory=frozenset)

    def accumulator(self, weight: Tensor, bias: Tensor | None, **overrides: Any) -> HeadLossAccumulator:
        """The loss that this call describes, ready to take heads."""
        row = self.row
        keywords: dict[str, Any] = {
            "seq_len": self.seq_len,
            "n_heads": self.n_heads,
            "first_shift": self.first_shift,
            "document_ids": self.document_ids,
            "token_weights": row.token_weights,
            "normalizer": 1.0 if row.reduction == "sum" else self.normalizer,
            "bias": bias,
            "class_weights": row.class_weights,
            "ignore_index": row.ignore_index,
            "options": RowOptions(row.label_smoothing, row.z_loss, row.softcap or 0.0, row.logit_scale),
            "detach_weight": self.detach_weight,
            "compute_dtype": self.compute_dtype,
            "chunk_rows": row.chunk_rows,
            "workspace_bytes": row.workspace_bytes,
            "group": row.group,
        }
        return HeadLossAccumulator(self.labels, weight, **(keywords | overrides))


def scaled(grad: Tensor | None, by: Tensor, dtype: torch.dtype | None) -> Tensor | None:
    """``grad * by`` as ``dtype``; never in place, because a backward may run again. ``by`` is 0-d."""
    if grad is None:
        return None
    if by.device.type == "cpu" and by.item() == 1.0:
        return grad.to(dtype)
    return (grad * by.to(grad.dtype)).to(dtype)
