"""The model: embedding, trunk, heads, unembedding."""

from __future__ import annotations

import dataclasses
import math
import pkgutil

import torch
from torch import Tensor, nn

from mtp_ext.nn.config import MTPConfig
from mtp_ext.nn.heads.head import Head
from mtp_ext.nn.heads.heads import Heads
from mtp_ext.nn.heads.unembedding import ReplicatedUnembedding
from mtp_ext.nn.multi_token_model import MultiTokenModel
from mtp_ext.nn.transformer.attention import AttentionContext
from mtp_ext.nn.transformer.kv_cache import KVCache
from mtp_ext.nn.transformer.layers import RMSNorm
from mtp_ext.nn.transformer.token_tree import TokenTree
from mtp_ext.nn.transformer.trunk import Trunk


class MTPHeads(Heads):
    """The heads described by a configuration.

    Args:
        config: The model's configuration.
        unembed: The unembedding, ``[V, D]`` or ``[n, V, D]``; owned by the model.
        embed: The embedding, likewise.
    """

    def __init__(self, config: MTPConfig, unembed: nn.Module, embed: nn.Embedding) -> None:
        shared = config.one_final_norm
        super().__init__(
            [_make_head(config, k, own_norm=not shared) for k in range(1, config.n_future + 1)],
            unembed,
            variant=config.variant,
            width=config.d_model,
            norm=RMSNorm(config.d_model, config.norm_eps) if shared else None,
            softcap=config.softcap,
            embed=embed,
            tied=config.tie_embeddings,
        )
        self.config = config

    def context(self, hidden: Tensor, tokens: Tensor | None, document_ids: Tensor | None) -> AttentionContext:
        context = AttentionContext.of_sequences(self.config, hidden.shape[1], document_ids, hidden.device, hidden.dtype)
        return dataclasses.replace(context, tokens=tokens)


def _make_head(config: MTPConfig, k: int, *, own_norm: bool) -> Head:
    """Makes head ``k``. Its layer index in the key-value cache continues after the trunk's."""
    layer, block = config.traits.layer, None
    if layer.module is not None and k >= layer.first_head:
        block = pkgutil.resolve_name(layer.module)(config, config.n_trunk_layers + k - 1, k)
    return Head(block, RMSNorm(config.d_model, config.norm_eps) if own_norm else None, config.norm_eps)


class MTPModel(MultiTokenModel):
    """A language model that predicts the next ``n_future`` tokens from each position (Gloeckle et al. 2024).

    ``P(x_{t+k} | x_{1..t}) = softmax(unembed @ head_k(trunk(x)_t))``, with ``head_k`` defined by ``config.variant``.
    Parameters are named ``embed.weight``, ``trunk.layers.*``, ``heads.0.*`` (head 1) to ``heads.{n-1}.*``,
    ``heads.norm.weight`` if the final norm is shared, and ``unembed.weight``: ``[V, D]`` (with ``tie_embeddings``, the
    same parameter as ``embed.weight``), or ``[n, V, D]`` if replicated (tied: ``[n - 1, V, D]``, heads 2 to n).

    Args:
        config: The model's configuration.
    """

    embed: nn.Embedding
    trunk: Trunk
    heads: MTPHeads

    def __init__(self, config: MTPConfig) -> None:
        embed = nn.Embedding(config.vocab_size, config.d_model)
        unembed: nn.Module
        if config.replicates:
            n_own = config.n_unembeddings - config.tie_embeddings
            unembed = ReplicatedUnembedding(n_own, config.vocab_size, config.d_model)
        else:
            unembed = nn.Linear(config.d_model, config.vocab_size, bias=False)
        super().__init__(Trunk(config, embed), MTPHeads(config, unembed, embed), unembed, embed)
        self.config = config
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialises the parameters from torch's global generator.

        Norms are 1. A matrix has standard deviation ``1 / sqrt(fan_in)``; those that write to the residual stream are
        scaled by ``1 / sqrt(2 * layers on the path)``, so that the stream's variance grows by at most 1 over the depth.
        The embedding has standard deviation 1, the unembedding 0.02 (the first loss is within a few hundredths of a nat
        of ``ln V``). :class:`MTPConfig` has a field for each.
        """
        config = self.config
        if config.tie_embeddings and isinstance(self.unembed, nn.Linear):
            self.unembed.weight = self.embed.weight  # again after to_empty, which unties parameters
        residual = config.residual_init_scale
        if residual is None:
            residual = 1 / math.sqrt(2 * max(1, config.path_layers))
        for name, module in self.named_modules():
            if isinstance(module, nn.RMSNorm):
                nn.init.ones_(module.weight)
            elif isinstance(module, nn.Linear) and module is not self.unembed:
                std = module.in_features**-0.5 if config.init_std is None else config.init_std
                writes_residual = name.endswith((".attention.out", ".ff.down"))
                nn.init.normal_(module.weight, std=std * residual if writes_residual else std)
        embed_std = config.embed_init_std
        if embed_std is None:
            embed_std = config.unembed_init_std if config.tie_embeddings else 1.0
        nn.init.normal_(self.embed.weight, std=embed_std)
        if config.replicates or not config.tie_embeddings:
            for weight in self.unembed.parameters():
                nn.init.normal_(weight, std=config.unembed_init_std)

    def prepare(self, tokens: Tensor, document_ids: Tensor | None) -> AttentionContext:
        if self.config.tie_embeddings and isinstance(self.unembed, nn.Linear):
            if self.unembed.weight is not self.embed.weight:
                raise ValueError(
                    "unembed.weight must be embed.weight where tie_embeddings is set, got two parameters: set "
                    "model.unembed.weight = model.embed.weight, before FSDP2 shards it, and shard both modules in one "
                    "group, fully_shard([model.embed, model.unembed]) or the model's"
                )
        return self.trunk.context(tokens, document_ids)

    def with_tokens_ahead(self, context: AttentionContext, tokens: Tensor | None) -> AttentionContext:
        return dataclasses.replace(context, tokens=tokens)

    def run_trunk(self, tokens: Tensor, document_ids: Tensor | None, context: AttentionContext) -> Tensor:
        hidden: Tensor = self.trunk(tokens, context=context)
        return hidden

    def cached_context(self, tokens: Tensor, cache: KVCache, tree: TokenTree | None = None) -> AttentionContext:
        return self.trunk.context(tokens, cache=cache, tree=tree)
