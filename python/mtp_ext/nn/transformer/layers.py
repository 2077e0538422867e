"""A Llama-style transformer layer and its parts, except attention."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from mtp_ext.nn.config import MTPConfig
from mtp_ext.nn.transformer.attention import Attention, AttentionContext
from mtp_ext.nn.transformer.linear import Linear
from mtp_ext.ops.rms_norm import rms_norm


class RMSNorm(nn.RMSNorm):
    """:class:`torch.nn.RMSNorm` over one dimension, through :func:`mtp_ext.ops.rms_norm.rms_norm`."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__(width, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``[..., D] -> [..., D]``."""
        assert self.eps is not None
        return rms_norm(x, self.weight, self.eps)


class SwiGLU(nn.Module):
    """``down(silu(gate(x)) * up(x))`` (Shazeer 2020, arXiv 2002.05202); gate and up share one GEMM."""

    def __init__(self, config: MTPConfig) -> None:
        super().__init__()
        self.gate_up = Linear(config.d_model, 2 * config.ff_dim)
        self.down = Linear(config.ff_dim, config.d_model)

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``[B, S, D] -> [B, S, D]``."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        y: Tensor = self.down(F.silu(gate) * up)
        return y


class Block(nn.Module):
    """A pre-norm transformer layer: ``x += drop(attention(norm(x))); x += drop(swiglu(norm(x)))``.

    Args:
        config: The model's configuration.
        layer: The layer's index in the key-value cache.
    """

    takes_queries = True

    def __init__(self, config: MTPConfig, layer: int) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.attention_norm = RMSNorm(config.d_model, config.norm_eps)
        self.attention = Attention(config, layer)
        self.ff_norm = RMSNorm(config.d_model, config.norm_eps)
        self.ff = SwiGLU(config)

    def forward(self, x: Tensor, context: AttentionContext) -> Tensor:
        """Maps ``[B, S, D] -> [B, S, D]``, or to ``[B, Q, D]`` where the context wants ``Q`` queries."""
        x = context.of_queries(x) + self._drop(self.attention(self.attention_norm(x), context))
        y: Tensor = x + self._drop(self.ff(self.ff_norm(x)))
        return y

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout) if self.training and self.dropout > 0 else x
