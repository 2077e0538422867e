"""The multi-token prediction module of DeepSeek-V3 (arXiv 2412.19437, section 2.2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtp_ext.nn.config import MTPConfig
from mtp_ext.nn.transformer.attention import AttentionContext
from mtp_ext.nn.transformer.layers import Block, RMSNorm
from mtp_ext.nn.transformer.linear import Linear


class SequentialModule(nn.Module):
    """``layer(joint @ [norm(state of the previous head); norm(embedding of the token before the target)])``.

    Head ``k`` at position ``s`` predicts token ``s + k`` from the state of head ``k - 1`` and the embedding of token
    ``s + k - 1``, which keeps the causal chain at each depth. Head 1 reads the trunk and has no such module. The
    embedding and the unembedding are the model's.

    Args:
        config: The model's configuration.
        layer: The layer's index in the key-value cache.
        k: The head, at least 2.
    """

    reads_embedding = True

    def __init__(self, config: MTPConfig, layer: int, k: int) -> None:
        super().__init__()
        self.ahead = k - 1
        self.state_norm = RMSNorm(config.d_model, config.norm_eps)
        self.token_norm = RMSNorm(config.d_model, config.norm_eps)
        self.joint = Linear(2 * config.d_model, config.d_model)
        self.block = Block(config, layer)

    def forward(self, x: Tensor, context: AttentionContext, embedding: Tensor) -> Tensor:
        """Maps ``[B, S, D] -> [B, S, D]``; ``context.tokens [B, >= S + k - 1]``, ``embedding [V, D]``."""
        assert context.tokens is not None, "the model gives the tokens ahead to heads that read them"
        tokens = context.tokens[:, self.ahead : self.ahead + x.shape[1]]
        read = F.embedding(tokens, embedding)
        joined = torch.cat([self.state_norm(x), self.token_norm(read)], dim=-1)
        y: Tensor = self.block(self.joint(joined), context)
        return y
