"""The parts of a Llama-style transformer layer besides attention, and the layer."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mtp_ext.nn.attention import Attention, AttentionContext
from mtp_ext.nn.config import MTPConfig


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


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x / sqrt(mean(x ** 2) + eps) * weight`` over the last dimension (Zhang & Sennrich 2019, arXiv 1910.07467).

    Args:
        x: ``[..., D]``.
        weight: ``[D]``.
        eps: Added to the mean square.
    """
    ours = x.device.type == "cpu" and x.dtype == weight.dtype and x.dtype in (torch.float32, torch.float64)
    if not ours:
        return F.rms_norm(x, weight.shape, weight, eps)
    y: Tensor = RMSNormFunction.apply(x, weight, eps)  # type: ignore[no-untyped-call]
    return y


class RMSNorm(nn.RMSNorm):
    """:class:`torch.nn.RMSNorm` over one dimension, through :func:`rms_norm`."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__(width, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., D] -> [..., D]``."""
        assert self.eps is not None
        return rms_norm(x, self.weight, self.eps)


class SwiGLU(nn.Module):
    """``down(silu(gate(x)) * up(x))`` (Shazeer 2020, arXiv 2002.05202); gate and up are one product."""

    def __init__(self, config: MTPConfig) -> None:
        super().__init__()
        self.gate_up = nn.Linear(config.d_model, 2 * config.ff_dim, bias=False)
        self.down = nn.Linear(config.ff_dim, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, S, D] -> [B, S, D]``."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        y: Tensor = self.down(F.silu(gate) * up)
        return y


class Block(nn.Module):
    """A pre-norm transformer layer: ``x += drop(attention(norm(x))); x += drop(swiglu(norm(x)))``.

    Args:
        config: The model's.
        layer: The layer's number in the key-value cache.
    """

    def __init__(self, config: MTPConfig, layer: int) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.attention_norm = RMSNorm(config.d_model, config.norm_eps)
        self.attention = Attention(config, layer)
        self.ff_norm = RMSNorm(config.d_model, config.norm_eps)
        self.ff = SwiGLU(config)

    def forward(self, x: Tensor, context: AttentionContext) -> Tensor:
        """``[B, S, D] -> [B, S, D]``."""
        x = x + self._drop(self.attention(self.attention_norm(x), context))
        y: Tensor = x + self._drop(self.ff(self.ff_norm(x)))
        return y

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout) if self.training and self.dropout > 0 else x
