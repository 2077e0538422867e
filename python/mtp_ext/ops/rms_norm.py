"""RMSNorm, of one head or of several that read the same hidden states (Zhang & Sennrich 2019, arXiv 1910.07467).

``y[k] = x / sqrt(mean(x ** 2) + eps) * weights[k]`` over the last dimension. On a GPU one kernel reads ``x`` once for
all heads (csrc/kernels/rms_norm.h); elsewhere, and for what the kernel does not take, it is torch's arithmetic.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mtp_ext.ops.common.checks import built_for, check_shape, describe
from mtp_ext.ops.common.dtensor import is_dtensor
from mtp_ext.ops.loss.device_rows import KERNEL_DTYPES

# A row as float32 must fit the shared memory of a block: 99 KiB on the smallest device that the kernels are built for.
LARGEST_WIDTH = 16384
_VECTOR_BYTES = 16


class RMSNormFunction(torch.autograd.Function):
    """RMSNorm with a backward of its own: torch composes it from single operations on a CPU, which take twice as long
    (2 ms against 4 ms for forward and backward of 2048 rows of width 256 in float32, one thread)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()  # [..., 1]
        ctx.save_for_backward(x, weight, scale)
        y: Tensor = (x * scale).mul_(weight)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, scale = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):  # the product with weight below must not be rounded
            per_weight = (x * scale).mul_(grad)
            grad_x = None
            if ctx.needs_input_grad[0]:
                # dL/dx = scale (w g) - x scale^2 / D * sum_j w_j g_j x_j scale
                along_x = (per_weight @ weight)[..., None].mul_(scale).mul_(scale).div_(-x.shape[-1])
                grad_x = (grad * weight).mul_(scale).addcmul_(x, along_x)
            grad_weight = per_weight.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight, None


class RMSNormHeadsFunction(torch.autograd.Function):
    """The kernel. ``x`` and ``residual`` ``[T, D]`` and ``weights [n, D]`` float32 are contiguous.

    Returns ``y [n, T, D]``, and ``x + residual`` where a residual is given.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, weights: Tensor, eps: float
    ) -> Tensor | tuple[Tensor, Tensor]:
        y, h, rstd = torch.ops.mtp_ext._rms_norm_heads(x, residual, weights, eps)
        ctx.save_for_backward(x if residual is None else h, weights, rstd)
        return y if residual is None else (y, h)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor, grad_h: Tensor | None = None) -> tuple[Tensor | None, ...]:
        h, weights, rstd = ctx.saved_tensors
        grad_x, grad_weights = torch.ops.mtp_ext._rms_norm_heads_backward(
            grad_y.contiguous(), h, None if grad_h is None else grad_h.contiguous(), weights, rstd
        )
        needs_x, needs_residual, needs_weights, _ = ctx.needs_input_grad
        return (
            grad_x if needs_x else None,
            grad_x if needs_residual else None,
            grad_weights if needs_weights else None,
            None,
        )


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x / sqrt(mean(x ** 2) + eps) * weight`` over the last dimension.

    Args:
        x: ``[..., D]``.
        weight: ``[D]``.
        eps: Added to the mean square.
    """
    if uses_kernel(x, weight):
        y: Tensor = _by_kernel(x, weight.unsqueeze(0), eps, None)
        return y.squeeze(0)
    if x.device.type == "cpu" and x.dtype == weight.dtype and x.dtype in (torch.float32, torch.float64):
        ours: Tensor = RMSNormFunction.apply(x, weight, eps)  # type: ignore[no-untyped-call]
        return ours
    return F.rms_norm(x, weight.shape, weight, eps)


def rms_norm_heads(
    x: Tensor, weights: Tensor, eps: float, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """The norms of ``n`` heads that read one and the same tensor; its mean square is formed once on a GPU.

    Args:
        x: ``[..., D]``, of any float dtype.
        weights: ``[n, D]``.
        eps: Added to the mean square.
        residual: Like ``x``; what is normed is then ``h = x + residual``, rounded to its dtype.
    Returns:
        ``[n, ..., D]`` of ``x``'s dtype; with a residual, also ``h [..., D]``. Differentiable once.
    Raises:
        ValueError: ``weights`` or ``residual`` do not fit ``x``.
    """
    if weights.dim() != 2 or weights.shape[0] == 0 or weights.shape[1] != x.shape[-1]:
        raise ValueError(f"weights must be [n, D] with n >= 1 and D = {x.shape[-1]}, got {describe(weights)}")
    if residual is not None:
        check_shape("residual", residual, x.shape, "that of x")
        if residual.dtype != x.dtype:
            raise ValueError(f"residual must have x's dtype, got {describe(residual)} for {describe(x)}")
    if uses_kernel(x, weights):
        outputs: Tensor | tuple[Tensor, Tensor] = _by_kernel(x, weights, eps, residual)
        return outputs
    h = x if residual is None else x + residual
    y = torch.stack([rms_norm(h, weight, eps) for weight in weights])
    return y if residual is None else (y, h)


def uses_kernel(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernel takes ``x [..., D]`` with these weights ``[..., D]``."""
    return (
        x.is_cuda
        and built_for("cuda")
        and x.dtype in KERNEL_DTYPES
        and weight.dtype in (torch.float32, x.dtype)
        and weight.device == x.device
        and not is_dtensor(x)
        and not is_dtensor(weight)
        and 0 < x.shape[-1] <= LARGEST_WIDTH
        and x.shape[-1] * x.element_size() % _VECTOR_BYTES == 0
    )


def _by_kernel(x: Tensor, weights: Tensor, eps: float, residual: Tensor | None) -> Any:
    width = x.shape[-1]
    rows = [None if t is None else t.reshape(-1, width).contiguous() for t in (x, residual)]
    outputs = RMSNormHeadsFunction.apply(*rows, weights.float().contiguous(), eps)  # type: ignore[no-untyped-call]
    shape = (weights.shape[0], *x.shape)
    return outputs.view(shape) if residual is None else (outputs[0].view(shape), outputs[1].view(x.shape))


@torch.library.register_fake("mtp_ext::_rms_norm_heads")  # type: ignore[untyped-decorator]
def _(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    rows, width = x.shape
    return (
        x.new_empty((weight.shape[0], rows, width)),
        x.new_empty((0 if residual is None else rows, width)),
        x.new_empty(rows, dtype=torch.float32),
    )


@torch.library.register_fake("mtp_ext::_rms_norm_heads_backward")  # type: ignore[untyped-decorator]
def _(grad_y: Tensor, h: Tensor, grad_h: Tensor | None, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(h), torch.empty_like(weight)
