"""One call of a public loss: its arguments, checked, in the form that the Functions and the operators take."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mtp_ext.ops.common import checks
from mtp_ext.ops.loss.device_rows import scaled_on_device


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

    def check(self, weight: Tensor) -> None:
        """Raises TypeError or ValueError for the first argument that is wrong."""
        device, vocab_size = weight.device, weight.shape[-2]
        checks.check_vector("bias", self.bias, vocab_size, "V", checks.FLOAT_DTYPES, device)
        checks.check_vector("class_weights", self.class_weights, vocab_size, "V", checks.FLOAT_DTYPES, device)
        checks.check_int("ignore_index", self.ignore_index)
        checks.check_options(self.label_smoothing, self.z_loss, self.softcap, self.logit_scale)
        checks.check_positive_int("chunk_rows", self.chunk_rows)
        checks.check_positive_int("workspace_bytes", self.workspace_bytes)
        checks.check_grad_weight_out(self.grad_weight_out, weight)
        checks.check_group(self.group)
        checks.check_reduction(self.reduction)


@dataclass(frozen=True)
class LossCall:
    """What a Function needs beside its differentiable inputs."""

    labels: Tensor  # [B, S']
    seq_len: int
    n_heads: int
    first_shift: int
    row: RowArguments
    compute_dtype: torch.dtype
    normalizer: str | float | Tensor = "per_head"
    document_ids: Tensor | None = None
    detach_weight: frozenset[int] = field(default_factory=frozenset)
    max_valid: list[int] | None = None  # [n]
    with_metrics: bool = True  # top-1 and accept length

    def tensors(self) -> tuple[Tensor | None, ...]:
        """The tensors that :mod:`mtp_ext.ops.loss.operators` take after hidden states, weight and bias."""
        return self.labels, self.document_ids, self.row.token_weights, self.row.class_weights

    def options(self) -> dict[str, Any]:
        """The keyword arguments that those operators share."""
        row = self.row
        return {
            "seq_len": self.seq_len,
            "n_heads": self.n_heads,
            "first_shift": self.first_shift,
            "ignore_index": row.ignore_index,
            "label_smoothing": row.label_smoothing,
            "z_loss": row.z_loss,
            "softcap": row.softcap or 0.0,
            "logit_scale": row.logit_scale,
            "detach_weight": sorted(self.detach_weight),
            "compute_dtype": self.compute_dtype,
            "chunk_rows": row.chunk_rows,
            "workspace_bytes": row.workspace_bytes,
            "max_valid": self.max_valid,
            "group_name": None if row.group is None else row.group.group_name,
        }

    def normalizers(self) -> tuple[Tensor | None, float]:
        """The normalizer as a tensor and a number, of which the operators use one; both absent: each head's mean."""
        if self.row.reduction in ("sum", "none"):
            return None, 1.0
        if isinstance(self.normalizer, Tensor):
            return self.normalizer, 0.0
        return None, 0.0 if isinstance(self.normalizer, str) else self.normalizer


def wants_grad(x: Tensor | None) -> bool:
    """Whether autograd will ask for the gradient of ``x``."""
    return x is not None and torch.is_grad_enabled() and x.requires_grad


def hand_out_grad_weight(grad: Tensor, by: Tensor, buffer: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The weight's gradient times ``by``: as ``dtype``, or added to ``buffer`` (``grad_weight_out``)."""
    if buffer is None:
        return scaled(grad, by, dtype)
    torch.ops.mtp_ext._add_scaled_(buffer, grad, by)
    return None


def scaled(grad: Tensor, by: Tensor, dtype: torch.dtype) -> Tensor:
    """``grad * by`` as ``dtype``, ``by`` 0-d and of 32 bits or more; never in place: a backward may run again."""
    if not torch.compiler.is_compiling() and by.device.type == "cpu" and by.item() == 1.0:
        return grad.to(dtype)
    if grad.is_cuda and torch.float64 not in (grad.dtype, dtype):  # the kernel has no float64
        return scaled_on_device(grad, by, dtype)
    # Not in 16 bits: a loss scale of 65536 is infinite in float16.
    wide = grad if grad.dtype.itemsize > 2 else grad.to(by.dtype)
    return (wide * by).to(dtype)


def saved_grad_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype that a gradient of ``hidden`` is kept in from forward to backward.

    The loss scale that keeps float16 gradients from underflowing arrives with the backward: until then, float32.
    """
    return torch.float32 if hidden.dtype == torch.float16 else hidden.dtype
