"""The trunk ``f_s``: from tokens to the hidden states that all heads read (Gloeckle et al. 2024, section 2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mtp_ext.nn.config import MTPConfig
from mtp_ext.nn.transformer.attention import AttentionContext
from mtp_ext.nn.transformer.checks import check_document_ids, check_tokens
from mtp_ext.nn.transformer.kv_cache import KVCache
from mtp_ext.nn.transformer.layers import Block
from mtp_ext.nn.transformer.token_tree import TokenTree


class Trunk(nn.Module):
    """The embedding and the trunk's transformer layers; the final norm belongs to the heads.

    With ``activation_checkpointing = True`` each layer keeps only its input and runs again in backward.

    Args:
        config: The model's configuration.
        embed: The embedding; owned by the model, as ``embed.weight``.
    """

    def __init__(self, config: MTPConfig, embed: nn.Embedding) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        self._borrowed = (embed,)  # in a tuple, so that it is not registered twice
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.n_trunk_layers))

    def forward(
        self,
        tokens: Tensor,
        document_ids: Tensor | None = None,
        cache: KVCache | None = None,
        *,
        context: AttentionContext | None = None,
    ) -> Tensor:
        """Computes the hidden states of ``tokens``.

        Args:
            tokens: ``[B, S]`` int64 or int32.
            document_ids: ``[B, S']``, ``S' >= S``: attention stays within tokens of one id.
            cache: Keys and values of the previous tokens. Those of ``tokens`` are added; the caller advances it.
            context: The result of :meth:`context`, if the caller shares it with the heads.
        Returns:
            ``[B, S, D]``.
        Raises:
            TypeError, ValueError: Wrong dtype, shape or range.
        """
        if context is None:
            context = self.context(tokens, document_ids, cache)
        x: Tensor = self._borrowed[0](tokens)
        again = self.activation_checkpointing and torch.is_grad_enabled()
        for layer in self.layers:
            x = checkpoint(layer, x, context, use_reentrant=False) if again else layer(x, context)
        return x

    def context(
        self,
        tokens: Tensor,
        document_ids: Tensor | None = None,
        cache: KVCache | None = None,
        n_again: int = 0,
        tree: TokenTree | None = None,
    ) -> AttentionContext:
        """Checks the inputs of a forward and builds the context of its attention layers.

        With a cache, these may read its last ``n_again`` tokens again, before the new ones, which may be a ``tree``.
        """
        weight = self._borrowed[0].weight
        read = tokens if tree is None else tokens[:, :1]  # the rest are drafts, which take fewer positions than tokens
        check_tokens(read, self.config, past=0 if cache is None else cache.max_length)
        seq_len = tokens.shape[1]
        if cache is not None:
            if document_ids is not None:
                raise ValueError("document_ids must be None if a cache is given: a cache holds one document per row")
            if tokens.shape[0] != cache.batch_size:
                raise ValueError(f"tokens must have the cache's {cache.batch_size} rows, got {list(tokens.shape)}")
            return AttentionContext.of_cached(self.config, seq_len, cache, tokens.device, weight.dtype, n_again, tree)
        if document_ids is not None:
            check_document_ids(document_ids, tokens)
            document_ids = document_ids[:, :seq_len]
        return AttentionContext.of_sequences(self.config, seq_len, document_ids, tokens.device, weight.dtype)
