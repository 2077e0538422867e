"""The tokens that heads read ahead of their position, and which targets are lost where they are not known."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from mtp_ext.ops import reference
from mtp_ext.ops.common.backend import can_read
from mtp_ext.ops.common.checks import INDEX_DTYPES, check_tensor, check_token_range, describe
from mtp_ext.ops.common.runtime import debug_checks_enabled
from mtp_ext.ops.loss.arguments import LossCall


def check_tokens_ahead(given: Tensor | None, labels: Tensor, seq_len: int, n_heads: int) -> None:
    """Checks the dtype, shape and device of the keyword ``tokens_ahead``."""
    if given is None:
        return
    check_tensor("tokens_ahead", given, dtypes=INDEX_DTYPES, shape="[B, S'']", device=labels.device)
    batch, least = labels.shape[0], min(labels.shape[1], seq_len + n_heads) - 1
    if given.dim() != 2 or given.shape[0] != batch or given.shape[1] < max(seq_len, least):
        raise ValueError(
            f"tokens_ahead must be [B, S''] with B = {batch} and S'' >= {max(seq_len, least)} (the row's tokens, and "
            f"all before its last target), got {describe(given)}"
        )


def tokens_read(
    call: LossCall, active: Collection[int], tokens: Tensor | None, given: Tensor | None, vocab_size: int
) -> tuple[Tensor, LossCall]:
    """Returns the tokens that heads read, ``[B, S + n - 1]``, and the call.

    Head ``k`` at position ``s`` reads those up to ``s + k - 1``. They are those of ``given``, else ``tokens`` and then
    ``labels``. A masked label does not tell its token: a target that depends on it is a ValueError on the CPU. On a GPU
    it becomes invalid, which makes the loss NaN.

    Args:
        call: The step's call.
        active: The heads whose targets count.
        tokens: ``[B, S]``, if known.
        given: The checked keyword ``tokens_ahead``.
        vocab_size: ``V``.
    """
    seq_len, width = call.seq_len, call.seq_len + call.n_heads - 1
    if given is not None:
        read = given[:, :width]
        check_token_range("tokens_ahead", read, vocab_size)
        if tokens is not None and can_read(read) and not torch.equal(read[:, :seq_len].long(), tokens.long()):
            raise ValueError("tokens_ahead must begin with tokens, and go on with those that follow them")
    else:
        call = _without_lost_targets(call, active, 1 if tokens is None else seq_len)
        read = call.labels[:, :width].clamp(0, vocab_size - 1)  # labels out of range are the loss's to refuse
        if tokens is not None:
            read = torch.cat([tokens, read[:, seq_len:].to(tokens.dtype)], dim=1)
    return F.pad(read, (0, width - read.shape[1])), call


def _without_lost_targets(call: LossCall, active: Collection[int], first_read: int) -> LossCall:
    """Refuses the targets of heads that read a masked label, or makes them invalid where the host cannot read them.

    Args:
        call: The step's call.
        active: The heads whose targets count.
        first_read: The first label that stands for a token.
    """
    labels, ignored = call.labels, call.ignore_index
    masked = labels == ignored
    masked[:, :first_read] = False
    unknown = masked.cumsum(1) > 0  # at or before each label
    lost = torch.zeros_like(masked)
    for k in active:
        if k == 1:
            continue  # head 1 reads no token
        counts = reference.shifted_targets(labels, k, call.seq_len, call.document_ids, ignored) != ignored
        n_rows = max(0, min(call.seq_len, labels.shape[1] - k))
        lost[:, k : k + n_rows] |= counts[:, :n_rows] & unknown[:, k - 1 : k - 1 + n_rows]
    if (can_read(lost) or debug_checks_enabled()) and lost.any():
        raise ValueError(
            f"labels must hold the tokens that heads read, got ignore_index={ignored} before the target at index "
            f"{lost.nonzero()[0].tolist()}: pass tokens_ahead, the tokens [B, S'] without the mask"
        )
    invalid = -1 if ignored != -1 else -2
    return call if can_read(lost) else replace(call, labels=labels.masked_fill(lost, invalid))
