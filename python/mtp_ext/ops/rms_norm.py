"""RMSNorm for one head, or for several that read the same hidden states (Zhang & Sennrich 2019, arXiv 1910.07467).

``y[k] = x / sqrt(mean(x ** 2) + eps) * weights[k]`` over the last dimension. On a GPU one kernel reads ``x`` once for
all heads (csrc/kernels/rms_norm.h); other devices, inputs that the kernel does not support, and calls
that torch.func transforms or torch.export writes down use torch operations.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mtp_ext.ops.common.backend import KERNEL_DTYPES, backend_of, can_read
from mtp_ext.ops.common.checks import describe
from mtp_ext.ops.common.runtime import is_dtensor
from mtp_ext.ops.common.transforms import is_transformed, is_written_down

# A float32 row must fit in a block's shared memory: 99 KiB on the smallest device that the kernels are built for.
LARGEST_WIDTH = 16384
_VECTOR_BYTES = 16


class RMSNormFunction(torch.autograd.Function):
    """RMSNorm on the CPU with a hand-written backward, twice as fast as torch's composite implementation.

    2 ms instead of 4 ms for forward and backward of 2048 rows of width 256 in float32, one thread.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, scale = _normed(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        ctx.eps = eps
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, scale = ctx.saved_tensors
        if torch.is_grad_enabled():
            return (*_differentiable_backward(grad, x, weight, ctx.eps), None)
        with torch.autocast(x.device.type, enabled=False):  # keeps the product with weight below in full precision
            per_weight = (x * scale).mul_(grad)
            grad_x = None
            if ctx.needs_input_grad[0]:
                # dL/dx = scale (w g) - x scale^2 / D * sum_j w_j g_j x_j scale
                along_x = (per_weight @ weight)[..., None].mul_(scale).mul_(scale).div_(-x.shape[-1])
                grad_x = (grad * weight).mul_(scale).addcmul_(x, along_x)
            grad_weight = per_weight.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight, None


def _normed(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Returns the norm ``[..., D]`` and ``1 / sqrt(mean(x ** 2) + eps) [..., 1]``."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return (x * scale).mul_(weight), scale


class RMSNormHeadsFunction(torch.autograd.Function):
    """The GPU kernel: contiguous ``x [T, D]`` and float32 ``weights [n, D]`` -> ``[n, T, D]``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, eps: float) -> Tensor:
        y, rstd = backend_of(x.device).rms_norm_heads(x, weights, eps)
        ctx.save_for_backward(x, weights, rstd)
        ctx.eps = eps
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weights, rstd = ctx.saved_tensors
        if torch.is_grad_enabled():
            return (*_differentiable_backward(grad, x, weights, ctx.eps), None)
        grad_x, grad_weights = backend_of(x.device).rms_norm_heads_backward(grad.contiguous(), x, weights, rstd)
        return grad_x if ctx.needs_input_grad[0] else None, grad_weights if ctx.needs_input_grad[1] else None, None


def _differentiable_backward(
    grad: Tensor, x: Tensor, weights: Tensor, eps: float
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of ``x [..., D]`` and ``weights [D]`` or ``[n, D]`` under ``create_graph``, in torch operations."""
    wide = x if x.dtype == torch.float64 else x.float()
    unit = wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    y = unit * weights if weights.dim() == 1 else unit * weights.view(weights.shape[0], *[1] * (x.dim() - 1), -1)
    wanted = [t for t in (x, weights) if t.requires_grad]
    found = iter(torch.autograd.grad(y, wanted, grad.to(y.dtype), create_graph=True))
    return next(found) if x.requires_grad else None, next(found) if weights.requires_grad else None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Computes ``x / sqrt(mean(x ** 2) + eps) * weight`` over the last dimension.

    Args:
        x: ``[..., D]``.
        weight: ``[D]``.
        eps: Added to the mean square.
    """
    if uses_kernel(x, weight):
        return _by_kernel(x, weight.unsqueeze(0), eps).squeeze(0)
    if x.device.type == "cpu" and x.dtype == weight.dtype and x.dtype in (torch.float32, torch.float64):
        if not torch.is_grad_enabled() and can_read(x):
            return _normed(x, weight, eps)[0]  # a few rows take 14 us, half of the time with a graph
        if not is_transformed() and not is_written_down():
            ours: Tensor = RMSNormFunction.apply(x, weight, eps)  # type: ignore[no-untyped-call]
            return ours
    return F.rms_norm(x, weight.shape, weight, eps)


def rms_norm_heads(x: Tensor, weights: Tensor, eps: float) -> Tensor:
    """Applies the norms of ``n`` heads to the same tensor; a GPU computes its mean square once.

    Args:
        x: ``[..., D]``, any floating dtype.
        weights: ``[n, D]``.
        eps: Added to the mean square.
    Returns:
        ``[n, ..., D]`` in ``x``'s dtype.
    Raises:
        ValueError: ``weights`` does not fit ``x``.
    """
    if weights.dim() != 2 or weights.shape[0] == 0 or weights.shape[1] != x.shape[-1]:
        raise ValueError(f"weights must be [n, D] with n >= 1 and D = {x.shape[-1]}, got {describe(weights)}")
    if uses_kernel(x, weights):
        return _by_kernel(x, weights, eps)
    return torch.stack([rms_norm(x, weight, eps) for weight in weights])


def uses_kernel(x: Tensor, weight: Tensor) -> bool:
    """Returns True if the kernel supports ``x [..., D]`` with these weights ``[..., D]``."""
    return (
        backend_of(x.device).has_kernels
        and x.dtype in KERNEL_DTYPES
        and weight.dtype in (torch.float32, x.dtype)
        and weight.device == x.device
        and not is_dtensor(x)
        and not is_dtensor(weight)
        and not is_transformed()
        and not is_written_down()
        and 0 < x.shape[-1] <= LARGEST_WIDTH
        and x.shape[-1] * x.element_size() % _VECTOR_BYTES == 0
    )


def _by_kernel(x: Tensor, weights: Tensor, eps: float) -> Tensor:
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    y: Tensor = RMSNormHeadsFunction.apply(rows, weights.float().contiguous(), eps)  # type: ignore[no-untyped-call]
    return y.view(weights.shape[0], *x.shape)


@torch.library.register_fake("mtp_ext::_rms_norm_heads")  # type: ignore[untyped-decorator]
def _(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    rows, width = x.shape
    return x.new_empty((weight.shape[0], rows, width)), x.new_empty(rows, dtype=torch.float32)


@torch.library.register_fake("mtp_ext::_rms_norm_heads_backward")  # type: ignore[untyped-decorator]
def _(grad_y: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight)
