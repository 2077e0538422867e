"""Any trunk under any heads: the forward, the loss and its schedules, without a word about what they are made of."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mtp_ext.nn.heads.heads import HeadModules, Heads, make_heads
from mtp_ext.nn.schedules.dispatch import check_schedule
from mtp_ext.nn.schedules.head_stack import head_outputs
from mtp_ext.nn.schedules.targets import StepKeywords, Targets
from mtp_ext.nn.transformer.checks import check_document_ids
from mtp_ext.ops.common.checks import INDEX_DTYPES, check_tensor, describe
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


class ComposedModel(MultiTokenModel):
    """Your own trunk, your own heads, in the order of any variant, with every schedule.

    Args:
        trunk: ``tokens [B, S] -> hidden [B, S, D]``; with a second positional parameter it also gets ``document_ids
            [B, S]`` or None. A trunk with a method ``context(tokens, document_ids)``, such as
            :class:`mtp_ext.nn.transformer.trunk.Trunk`, is called as ``trunk(tokens, context=...)``.
        heads: ``n`` modules, or a function that makes the one of head ``k`` in ``1..n``. Each maps ``[B, S, D]`` to
            ``[B, S, D]``; with a second positional parameter it also gets the trunk's context (without one, the
            document ids). Each gets a final RMSNorm of its own; pass :class:`mtp_ext.nn.Head` to choose another.
        unembed: A module with ``weight [V, D]``, or ``[n, V, D]``, as :class:`torch.nn.Linear` has one.
        variant: Whose order the heads run in: "causal" chains head 1 to ``n``, "anticausal" ``n`` to 1; in the others
            every head reads the trunk.
        n_future: ``n``; needed where ``heads`` is a function.
        softcap: Of the logits.
    Raises:
        TypeError, ValueError: A wrong argument.
    """

    def __init__(
        self,
        trunk: nn.Module,
        heads: HeadModules,
        unembed: nn.Module,
        *,
        variant: str = "parallel",
        n_future: int | None = None,
        softcap: float | None = None,
    ) -> None:
        weight = getattr(unembed, "weight", None)
        if not isinstance(weight, Tensor) or weight.dim() not in (2, 3):
            raise TypeError(f"unembed must have a weight [V, D] or [n, V, D], got {describe(weight)}")
        width = weight.shape[-1]
        made = make_heads(heads, n_future, width)
        if weight.dim() == 3 and weight.shape[0] != len(made):
            raise ValueError(f"unembed must have a weight [n, V, D] with n = {len(made)}, got {describe(weight)}")
        super().__init__(trunk, Heads(made, unembed, variant=variant, width=width, softcap=softcap), unembed)
        self.variant = variant
        self._has_context = callable(getattr(trunk, "context", None))
        parameters = list(inspect.signature(trunk.forward).parameters.values())
        self._takes_documents = len([p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]) >= 2

    def prepare(self, tokens: Tensor, document_ids: Tensor | None) -> Any:
        """As of the base class."""
        check_tensor("tokens", tokens, dtypes=INDEX_DTYPES, shape="[B, S]")
        if tokens.dim() != 2:
            raise ValueError(f"tokens must be [B, S], got {describe(tokens)}")
        if document_ids is not None:
            check_document_ids(document_ids, tokens)
            if not self._takes_documents and not self._has_context:
                raise ValueError("document_ids must be None: the trunk does not take them and would attend across")
            document_ids = document_ids[:, : tokens.shape[1]]
        if not self._has_context:
            return document_ids
        make: Callable[[Tensor, Tensor | None], Any] = self.trunk.context  # type: ignore[assignment]
        return make(tokens, document_ids)

    def run_trunk(self, tokens: Tensor, document_ids: Tensor | None, context: Any) -> Tensor:
        """As of the base class."""
        if self._has_context:
            hidden: Tensor = self.trunk(tokens, context=context)
        else:
            hidden = self.trunk(tokens, context) if self._takes_documents else self.trunk(tokens)
        if hidden.shape != (*tokens.shape, self.heads.width):
            raise ValueError(f"trunk must give [B, S, D] = {[*tokens.shape, self.heads.width]}, got {describe(hidden)}")
        return hidden
