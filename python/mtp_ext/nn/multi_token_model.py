"""The base of all models: a trunk with heads, their forward, loss and schedules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtp_ext.nn.heads.heads import Heads
from mtp_ext.nn.schedules.dispatch import check_schedule
from mtp_ext.nn.schedules.head_stack import head_outputs
from mtp_ext.nn.schedules.targets import StepKeywords, Targets
from mtp_ext.nn.transformer.kv_cache import KVCache
from mtp_ext.nn.transformer.token_tree import TokenTree
from mtp_ext.ops.common.result import MultiTokenLoss

if TYPE_CHECKING:
    from typing_extensions import Unpack


class MultiTokenModel(nn.Module):
    """A trunk and heads. Parameters are ``trunk.*``, ``heads.0.*`` (head 1) to ``heads.{n-1}.*`` and ``unembed.*``.

    Args:
        trunk: ``tokens [B, S] -> hidden [B, S, D]``.
        heads: The heads.
        unembed: The module that owns the unembedding.
        embed: The module that owns the embedding, if the trunk does not.
    """

    accepts_loss_kwargs = False
    """Tells transformers' Trainer that the loss is a mean, which it then averages over accumulated batches."""

    def __init__(self, trunk: nn.Module, heads: Heads, unembed: nn.Module, embed: nn.Module | None = None) -> None:
        super().__init__()
        # Optimizer states index parameters in this order.
        if embed is not None:
            self.embed = embed
        self.unembed, self.trunk, self.heads = unembed, trunk, heads
        self.register_state_dict_post_hook(_copy_shared)  # type: ignore[no-untyped-call]

    def __setattr__(self, name: str, value: Any) -> None:
        present = self.__dict__.get("_modules", {})
        if name in ("embed", "unembed") and "heads" in present and value is not present.get(name):
            raise ValueError(
                f"{name} must stay the module that the model was built with, because trunk and heads read it too: "
                f"change {name}.weight, or build the model again from its parts"
            )
        super().__setattr__(name, value)

    def prepare(self, tokens: Tensor, document_ids: Tensor | None) -> Any:
        """Checks the inputs of a forward and returns the context shared by trunk and heads."""
        raise NotImplementedError

    def with_tokens_ahead(self, context: Any, tokens: Tensor | None) -> Any:
        """Adds the tokens ``[B, S + n - 1]`` to the context, for heads that read them."""
        return context

    def run_trunk(self, tokens: Tensor, document_ids: Tensor | None, context: Any) -> Tensor:
        """Returns the trunk's output ``[B, S, D]``."""
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
        """Computes the loss of all heads or, without labels, the next token's logits.

        Args:
            tokens: ``[B, S]`` int64 or int32.
            labels: ``[B, S']``, ``S' >= S``, UNSHIFTED ids: head ``k`` at position ``s`` predicts ``labels[:, s + k]``;
                ``S' = S + n`` loses no target.
            document_ids: ``[B, S']``: attention and targets stay within tokens of one id.
            head_weights: ``n`` numbers; default 1, the paper's plain sum. A head of weight 0 does not run unless
                another reads it; its loss and top-1 are reported as 0.
            schedule: ``"sequential"`` (least memory: ``loss.backward()`` runs only the trunk), ``"joint"`` (fastest for
                small batches) or ``"autograd"`` (plain torch with full logits). Loss and gradients are the same.
            options: :class:`mtp_ext.RowOptions`: label smoothing, z-loss, logit scale, class weights. They apply to
                the loss only: :meth:`all_logits` uses just the model's own soft cap.
            detach_heads: 1-based heads that learn but send no gradient to their input (the trunk, or the previous head
                in a chained variant).
            tokens_ahead: ``[B, S'']``, the row's tokens and those that follow, for heads that read tokens ahead
                (``sequential_modules``). By default they are read from ``labels``; needed where a target depends on
                one that is masked there.
            token_weights, normalizer, ignore_index, detach_weight, chunk_rows, workspace_bytes, max_valid: See
                :func:`mtp_ext.multi_token_cross_entropy`.
        Returns:
            With ``labels``, :class:`MultiTokenLoss`; only its ``loss`` is differentiable, once. Without, head 1's
            logits ``[B, S, V]``.
        Raises:
            TypeError, ValueError: A wrong argument; raised before any work, except for labels outside ``[0, V)``.
        """
        check_schedule(schedule)
        context = self.prepare(tokens, document_ids)
        if labels is None:
            hidden = self.run_trunk(tokens, document_ids, context)
            outputs = head_outputs(self.heads, hidden, context, active=(1,))
            return self.heads.logits(1, outputs[1])
        batch, seq_len = tokens.shape
        targets = Targets.checked(
            self.heads,
            labels,
            document_ids,
            head_weights,
            keywords,
            batch=batch,
            seq_len=seq_len,
            device=tokens.device,
            tokens=tokens,
        )
        context = self.with_tokens_ahead(context, targets.tokens)
        return self.heads.loss(self.run_trunk(tokens, document_ids, context), targets, context, schedule)

    def all_logits(self, tokens: Tensor, document_ids: Tensor | None = None) -> Tensor:
        """Returns all heads' logits ``[n, B, S, V]``, for inspection; ``[k - 1, :, s]`` predicts token ``s + k``.

        Heads that read tokens ahead (``sequential_modules``) read token 0 past the end of ``tokens``.
        """
        context = self.prepare(tokens, document_ids)
        context = self.with_tokens_ahead(context, F.pad(tokens, (0, self.heads.n_heads - 1)))
        outputs = head_outputs(self.heads, self.run_trunk(tokens, document_ids, context), context)
        return torch.stack([self.heads.logits(k, output) for k, output in outputs.items()])

    @property
    def max_seq_len(self) -> int | None:
        """The longest sequence that the trunk or its configuration allows; None if they do not say."""
        limit: int | None = getattr(self.trunk, "max_seq_len", None)
        return getattr(getattr(self.trunk, "config", None), "max_seq_len", None) if limit is None else limit

    def check_decoding(self) -> None:
        """Raises TypeError or ValueError if the model cannot decode with a key-value cache."""

    def cached_context(self, tokens: Tensor, cache: KVCache, tree: TokenTree | None = None) -> Any:
        """Checks tokens ``[B, S]`` that follow those in ``cache`` and returns the context shared by trunk and heads.

        Args:
            tokens: One after the other, or a ``tree``.
            cache: The tokens before.
            tree: The form of ``tokens``.
        """
        raise NotImplementedError


def _copy_shared(model: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """Copies what a state dict holds under several names (tied weights): safetensors refuses to save shared memory."""
    seen: set[Tensor] = set()
    for name, parameter in model.named_parameters(prefix.rstrip("."), remove_duplicate=False):
        value = state.get(name)
        if parameter in seen and isinstance(value, Tensor) and not isinstance(value, nn.Parameter):  # keep_vars
            state[name] = value.clone()
        seen.add(parameter)
