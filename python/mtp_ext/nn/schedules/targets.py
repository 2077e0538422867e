"""The labels of one step and their options: the inputs of every schedule besides the hidden states."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import TypedDict

import torch
from torch import Tensor

from mtp_ext.nn.schedules.head_stack import HeadStack
from mtp_ext.nn.schedules.tokens_ahead import check_tokens_ahead, tokens_read
from mtp_ext.ops.common import checks
from mtp_ext.ops.common.backend import can_read
from mtp_ext.ops.common.runtime import autocast_dtype
from mtp_ext.ops.loss.arguments import LossCall
from mtp_ext.ops.loss.options import RowOptions


class StepKeywords(TypedDict, total=False):
    """The keyword arguments of every model's forward; the defaults are those of the loss.

    The others are documented in :func:`mtp_ext.multi_token_cross_entropy`.

    Attributes:
        options: How a row of logits becomes a loss: smoothing, z-loss, scale, cap, class weights.
        detach_heads: 1-based heads that learn but send no gradient to their input (the trunk, or the previous head in a
            chained variant).
        tokens_ahead: ``[B, S'']``, the row's tokens and those that follow, for heads that read them
            (``sequential_modules``); by default those of ``labels``, where none that a target depends on is masked.
    """

    options: RowOptions
    detach_heads: Collection[int]
    tokens_ahead: Tensor | None
    detach_weight: Collection[int]
    token_weights: Tensor | None
    normalizer: str | float | Tensor
    ignore_index: int
    chunk_rows: int | None
    workspace_bytes: int | None
    max_valid: int | Sequence[int] | None


_KEYWORDS = frozenset(StepKeywords.__optional_keys__)


@dataclass(frozen=True)
class Targets:
    """The checked arguments of a step."""

    call: LossCall  # compute_dtype is float32 until the hidden states are known: see of_hidden
    active: frozenset[int]  # heads that run; the others' weights are known to be 0
    detach_heads: frozenset[int]
    tokens: Tensor | None = None  # [B, S + n - 1], for heads that read them

    @staticmethod
    def checked(
        heads: HeadStack,
        labels: Tensor,
        document_ids: Tensor | None,
        head_weights: Tensor | Sequence[float] | None,
        keywords: StepKeywords,
        *,
        batch: int,
        seq_len: int,
        device: torch.device,
        tokens: Tensor | None = None,
    ) -> Targets:
        """Checks the arguments of a forward; raises TypeError or ValueError for the first wrong one.

        ``tokens [B, S]`` are those of the trunk, if it has run within this forward.
        """
        if unknown := keywords.keys() - _KEYWORDS:
            raise TypeError(f"forward() got an unexpected keyword argument {min(unknown)!r}")
        checks.check_labels(labels, batch, seq_len, device)
        token_weights = keywords.get("token_weights")
        checks.check_like_labels(labels, document_ids, token_weights)
        n_heads = heads.n_heads
        weights = checks.checked_head_weights(head_weights, n_heads, device)
        call = LossCall(
            labels=labels,
            seq_len=seq_len,
            n_heads=n_heads,
            first_shift=1,
            compute_dtype=torch.float32,
            options=_checked_options(heads, keywords.get("options"), device),
            head_weights=weights,
            document_ids=document_ids,
            token_weights=token_weights,
            normalizer=checks.checked_normalizer(keywords.get("normalizer", "per_head")),
            ignore_index=keywords.get("ignore_index", -100),
            detach_weight=checks.checked_heads("detach_weight", keywords.get("detach_weight", ()), n_heads),
            max_valid=checks.checked_max_valid(keywords.get("max_valid"), n_heads),
            chunk_rows=keywords.get("chunk_rows"),
            workspace_bytes=keywords.get("workspace_bytes"),
        )
        call.check_values()
        known = weights if weights is not None and can_read(weights) else head_weights
        detach_heads = checks.checked_heads("detach_heads", keywords.get("detach_heads", ()), n_heads)
        active, ahead = _active_heads(known, n_heads), keywords.get("tokens_ahead")
        check_tokens_ahead(ahead, labels, seq_len, n_heads)
        if not heads.reads_tokens:
            return Targets(call, active, detach_heads)
        read, call = tokens_read(call, active, tokens, ahead, heads.vocab_size)
        return Targets(call, active, detach_heads, read)

    def with_bias(self, bias: Tensor | None) -> Targets:
        """Returns the targets with the bias ``[V]`` of the unembedding."""
        return self if bias is None else replace(self, call=replace(self.call, bias=bias))

    def of_hidden(self, hidden: Tensor) -> LossCall:
        """Returns the call with the compute dtype for ``hidden``."""
        return replace(self.call, compute_dtype=autocast_dtype(hidden) or hidden.dtype)


def _checked_options(heads: HeadStack, options: RowOptions | None, device: torch.device) -> RowOptions:
    """Checks ``options`` and returns them with the heads' soft cap."""
    if options is None:
        return RowOptions(softcap=heads.softcap)
    if not isinstance(options, RowOptions):
        raise TypeError(f"options must be mtp_ext.RowOptions or None, got {checks.describe(options)}")
    if options.softcap not in (None, heads.softcap):
        raise ValueError(f"options.softcap must be None or the model's own {heads.softcap}, got {options.softcap}")
    options.check(heads.vocab_size, device)
    return replace(options, softcap=heads.softcap)


def _active_heads(head_weights: Tensor | Sequence[float] | None, n_heads: int) -> frozenset[int]:
    """Returns the heads whose weight is not known to be 0.

    A learned weight needs its head's loss, and reading weights on a GPU would sync.
    """
    every = frozenset(range(1, n_heads + 1))
    if head_weights is None or torch.compiler.is_compiling():
        return every
    if isinstance(head_weights, Tensor):
        if head_weights.requires_grad or not can_read(head_weights):
            return every
        head_weights = head_weights.tolist()
    return frozenset(k for k, weight in enumerate(head_weights, 1) if weight != 0)
