"""The model: embedding, trunk, heads, unembedding."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtp_ext.nn.config import MTPConfig, check_implemented
from mtp_ext.nn.heads import MTPHeads
from mtp_ext.nn.kv_cache import KVCache
from mtp_ext.nn.schedule import check_schedule, head_outputs
from mtp_ext.nn.targets import Targets
from mtp_ext.nn.trunk import Trunk
from mtp_ext.ops.result import MultiTokenLoss


class MTPModel(nn.Module):
    """A language model that predicts the next ``n_future`` tokens from each position (Gloeckle et al. 2024).

    ``P(x_{t+k} | x_{1..t}) = softmax(unembed @ head_k(trunk(x)_t))``. Parameters are named ``embed.weight``,
    ``trunk.layers.*``, ``heads.0.*`` (head 1) to ``heads.{n-1}.*``, ``heads.norm.weight`` if the final norm is shared,
    and ``unembed.weight`` (with ``tie_embeddings``, the same parameter as ``embed.weight``).

    Args:
        config: Sizes and choices.
    Raises:
        NotImplementedError: ``config.variant`` has no model yet.
    """

    def __init__(self, config: MTPConfig) -> None:
        super().__init__()
        check_implemented(config.variant)
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        self.unembed = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.trunk = Trunk(config, self.embed)
        self.heads = MTPHeads(config, self.unembed)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws the initial parameters (again) from torch's global generator.

        Norms are 1. A matrix has standard deviation ``1 / sqrt(fan_in)``; those that write to the residual stream are
        scaled by ``1 / sqrt(2 * layers on the path)``, so that the stream's variance grows by at most 1 over the depth.
        The embedding has 1 and the unembedding 0.02 (the first loss is ``ln V`` but for a few hundredths of a nat).
        :class:`MTPConfig` has a field for each.
        """
        config = self.config
        if config.tie_embeddings:
            self.unembed.weight = self.embed.weight  # also after to_empty, which takes tied parameters apart
        residual = config.residual_init_scale
        if residual is None:
            residual = 1 / math.sqrt(2 * config.path_layers)
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
        if not config.tie_embeddings:
            nn.init.normal_(self.unembed.weight, std=config.unembed_init_std)

    def forward(
        self,
        tokens: Tensor,
        labels: Tensor | None = None,
        document_ids: Tensor | None = None,
        head_weights: Tensor | Sequence[float] | None = None,
        schedule: str = "sequential",
        *,
        normalizer: str | float | Tensor = "per_head",
        ignore_index: int = -100,
        chunk_rows: int | None = None,
        workspace_bytes: int | None = None,
    ) -> MultiTokenLoss | Tensor:
        """The loss of all heads, or the next token's logits.

        Args:
            tokens: ``[B, S]`` int64 or int32.
            labels: ``[B, S']``, ``S' >= S``, UNSHIFTED ids: head ``k`` at position ``s`` predicts ``labels[:, s + k]``;
                ``S' = S + n`` loses no target.
            document_ids: ``[B, S']``: attention and targets stay within tokens of one id.
            head_weights: ``n`` numbers; default 1, the paper's plain sum.
            schedule: ``"sequential"`` (least memory: ``loss.backward()`` then runs the trunk alone), ``"joint"``
                (fastest for small batches) or ``"autograd"`` (plain torch with full logits). One loss, one gradient.
            normalizer, ignore_index, chunk_rows, workspace_bytes: See :func:`mtp_ext.multi_token_cross_entropy`.
        Returns:
            With ``labels``, :class:`MultiTokenLoss`; only its ``loss`` is differentiable. Without, head 1's logits
            ``[B, S, V]``.
        Raises:
            TypeError, ValueError: A wrong argument; raised before any work, but for labels that are no class.
        """
        context = self.trunk.context(tokens, document_ids)
        if labels is None:
            logits: Tensor = self.unembed(self.heads.run(1, self.trunk(tokens, context=context), context)[1])
            return logits
        check_schedule(schedule)
        targets = Targets.checked(
            labels,
            batch=tokens.shape[0],
            seq_len=tokens.shape[1],
            n_heads=self.config.n_future,
            device=tokens.device,
            document_ids=document_ids,
            head_weights=head_weights,
            normalizer=normalizer,
            ignore_index=ignore_index,
            chunk_rows=chunk_rows,
            workspace_bytes=workspace_bytes,
        )
        return self.heads.loss(self.trunk(tokens, context=context), targets, context, schedule)

    def all_logits(self, tokens: Tensor, document_ids: Tensor | None = None) -> Tensor:
        """Logits of all heads, ``[n, B, S, V]``; ``[k - 1, :, s]`` predicts token ``s + k``. To inspect and to test."""
        context = self.trunk.context(tokens, document_ids)
        outputs = head_outputs(self.heads, self.trunk(tokens, context=context), context)
        return F.linear(torch.stack(outputs), self.unembed.weight)

    def next_token_logits(self, tokens: Tensor, cache: KVCache, counts: Sequence[int]) -> Tensor:
        """Reads tokens into ``cache`` and returns head 1's logits after the last token of each row.

        Args:
            tokens: ``[B, S]``, the next tokens of each row, padded on the right.
            cache: The tokens before; advanced by ``counts``.
            counts: How many of the ``S`` tokens of each row are real, at least 1.
        Returns:
            ``[B, V]``.
        """
        context = self.trunk.context(tokens, cache=cache)
        normed = self.heads.run(1, self.trunk(tokens, context=context), context)[1]
        cache.advance(counts)
        last = torch.tensor(counts, device=tokens.device) - 1
        logits: Tensor = self.unembed(normed[torch.arange(len(counts), device=tokens.device), last])
        return logits
