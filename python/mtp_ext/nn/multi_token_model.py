"""Any trunk under any heads: the forward, the loss and its schedules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mtp_ext.nn.heads.heads import Heads
from mtp_ext.nn.schedules.dispatch import check_schedule
from mtp_ext.nn.schedules.head_stack import head_outputs
from mtp_ext.nn.schedules.targets import StepKeywords, Targets
from mtp_ext.ops.common.result import MultiTokenLoss

if TYPE_CHECKING:
    from typing_extensions import Unpack


class MultiTokenModel(nn.Module):
    """A trunk and heads. Parameters are ``trunk.*``, ``heads.0.*`` (head 1) to ``heads.{n-1}.*`` and ``unembed.*``.

    Args:
        trunk: ``tokens [B, S] -> hidden [B, S, D]``.
        heads: The heads.
        unembed: The module that owns the unembedding.
        embed: That of the embedding, where the trunk does not.
    """

    def __init__(self, trunk: nn.Module, heads: Heads, unembed: nn.Module, embed: nn.Module | None = None) -> None:
        super().__init__()
        # The order of the parameters, which an optimiser's state counts by.
        if embed is not None:
            self.embed = embed
        self.unembed, self.trunk, self.heads = unembed, trunk, heads

    def prepare(self, tokens: Tensor, document_ids: Tensor | None) -> Any:
        """Checks the inputs of a forward; returns the context that trunk and heads share."""
        raise NotImplementedError

    def with_tokens_ahead(self, context: Any, tokens: Tensor, labels: Tensor | None) -> Any:
        """The context for heads that read tokens beyond their position; only some heads do."""
        return context

    def run_trunk(self, tokens: Tensor, document_ids: Tensor | None, context: Any) -> Tensor:
        """The trunk's output ``[B, S, D]``."""
        raise NotImplementedError

    def forward(
        self,
        tokens: Tensor,
        labels: Tensor | None = None,
        document_ids: Tensor | None = None,
        head_weights: Tensor | Sequence[float] | None = None,
        schedule: str = "sequential",
        **keywords: Unpack[StepKeywords],
    ) -> MultiTokenLoss | Tensor:
        """The loss of all heads, or the next token's logits.

        Args:
            tokens: ``[B, S]`` int64 or int32.
            labels: ``[B, S']``, ``S' >= S``, UNSHIFTED ids: head ``k`` at position ``s`` predicts ``labels[:, s + k]``;
                ``S' = S + n`` loses no target.
            document_ids: ``[B, S']``: attention and targets stay within tokens of one id.
            head_weights: ``n`` numbers; default 1, the paper's plain sum. A head of weight 0 does not run, unless
                another reads it; its loss and top-1 are given as 0.
            schedule: ``"sequential"`` (least memory: ``loss.backward()`` then runs the trunk alone), ``"joint"``
                (fastest for small batches) or ``"autograd"`` (plain torch with full logits). One loss, one gradient.
            options: :class:`mtp_ext.RowOptions`: label smoothing, z-loss, logit scale, class weights. They are the
                loss's: :meth:`all_logits` knows the model's own soft cap alone.
            detach_heads: 1-based heads that learn but send no gradient to what they read (the trunk, or the head before
                in a chained variant).
            token_weights, normalizer, ignore_index, detach_weight, chunk_rows, workspace_bytes, max_valid: See
                :func:`mtp_ext.multi_token_cross_entropy`.
        Returns:
            With ``labels``, :class:`MultiTokenLoss`; only its ``loss`` is differentiable, once. Without, head 1's
            logits ``[B, S, V]``.
        Raises:
            TypeError, ValueError: A wrong argument; raised before any work, but for labels that are no class.
        """
        check_schedule(schedule)
        context = self.prepare(tokens, document_ids)
        if labels is None:
            hidden = self.run_trunk(tokens, document_ids, context)
            outputs = head_outputs(self.heads, hidden, context, active=(1,))
            return self.heads.logits(1, outputs[1])
        batch, seq_len = tokens.shape
        targets = Targets.checked(
            self.heads, labels, document_ids, head_weights, keywords, batch=batch, seq_len=seq_len, device=tokens.device
        )
        context = self.with_tokens_ahead(context, tokens, labels)
        return self.heads.loss(self.run_trunk(tokens, document_ids, context), targets, context, schedule)

    def all_logits(self, tokens: Tensor, document_ids: Tensor | None = None) -> Tensor:
        """Logits of all heads, ``[n, B, S, V]``; ``[k - 1, :, s]`` predicts token ``s + k``. To inspect and to test.

        Heads that read tokens ahead (``sequential_modules``) read token 0 past the end of ``tokens``.
        """
        context = self.with_tokens_ahead(self.prepare(tokens, document_ids), tokens, None)
        outputs = head_outputs(self.heads, self.run_trunk(tokens, document_ids, context), context)
        return torch.stack([self.heads.logits(k, output) for k, output in outputs.items()])
