"""The result of a loss, and its metrics from per-row tables."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor


class MultiTokenLoss(NamedTuple):
    """The loss of ``n`` heads and metrics from the same pass over the logits. Only ``loss`` is differentiable.

    Attributes:
        loss: 0-d, ``sum_k head_weights[k] * head_loss[k]``, in nats.
        head_loss: ``[n]``, each head's loss over its valid targets divided by the normalizer; 0 without targets.
        n_valid: ``[n]`` int64, the number of valid targets (present, not ignored, in their position's document, of
            non-zero weight).
        top1: ``[n]`` float32, the fraction of valid targets that the head ranks first.
        accept_length: 0-d float32, the mean number of tokens that one self-speculative step would emit with these
            logits: 1 + the longest prefix of heads ``2..n`` whose argmax equals head 1's argmax at the position that
            verifies it. Averaged over positions where every head has a valid target and a verifying position; 1.0 if
            there is none.
    """

    loss: Tensor
    head_loss: Tensor
    n_valid: Tensor
    top1: Tensor
    accept_length: Tensor


METRICS = tuple(name for name in MultiTokenLoss._fields if name not in ("loss", "head_loss", "n_valid"))


class RowTables(NamedTuple):
    """Per-row results, ``[n, B, S]``, in the order of csrc's ``RowTables``.

    Rows without a target hold 0, 0 and -1.
    """

    loss: Tensor  # float32, or float64 for float64 logits
    lse: Tensor
    predicted: Tensor  # int32, the argmax

    @staticmethod
    def zeros(*shape: int, dtype: torch.dtype, device: torch.device) -> RowTables:
        """Returns the tables of rows without a target."""
        return RowTables(
            loss=torch.zeros(shape, dtype=dtype, device=device),
            lse=torch.zeros(shape, dtype=dtype, device=device),
            predicted=torch.full(shape, -1, dtype=torch.int32, device=device),
        )


def head_metrics(
    tables: RowTables, labels: Tensor, n_valid: Tensor, first_shift: int, heads: Collection[int] | None = None
) -> dict[str, Tensor]:
    """Computes the metrics of :class:`MultiTokenLoss`, by field name.

    Args:
        tables: ``[n, B, S]``.
        labels: ``[B, S']``, unshifted.
        n_valid: ``[n]``.
        first_shift: Shift of head 1.
        heads: The heads that ran, ``1..n``; default all. The accept length covers the leading ones: no position
            would be left with a head that did not run.
    """
    predicted = tables.predicted
    leading = next((k for k in range(len(predicted)) if heads is not None and k + 1 not in heads), len(predicted))
    return {
        "top1": top1(predicted, labels, n_valid, first_shift),
        "accept_length": acceptance_length(predicted[:leading] if leading else predicted),
    }


def empty_metrics(like: Tensor, n_heads: int | None) -> dict[str, Tensor]:
    """Returns uninitialised metrics on ``like``'s device, in the shapes of :func:`head_metrics`.

    With ``n_heads`` None they have no elements, for callers that read no metric.
    """
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(METRICS, (0,))
    if n_heads is not None:
        shapes = {"top1": (n_heads,), "accept_length": ()}
    return {name: like.new_empty(shape, dtype=torch.float32) for name, shape in shapes.items()}


def top1(predicted: Tensor, labels: Tensor, n_valid: Tensor, first_shift: int) -> Tensor:
    """The fraction of valid targets that each head ranks first.

    Args:
        predicted: ``[n, B, S]``, -1 where the head has no target.
        labels: ``[B, S']``, unshifted.
        n_valid: ``[n]``.
        first_shift: Shift of head 1.
    Returns:
        ``[n]`` float32; 0 for a head without targets.
    """
    seq_len, label_len = predicted.shape[2], labels.shape[1]
    hits = []
    for k in range(predicted.shape[0]):
        shift = first_shift + k
        width = min(seq_len, label_len - shift)
        if width <= 0:
            hits.append(torch.zeros((), dtype=torch.int64, device=labels.device))
            continue
        guess = predicted[k, :, :width]
        hits.append(((guess >= 0) & (guess == labels[:, shift : shift + width])).sum())
    return torch.stack(hits).float() / n_valid.clamp(min=1)


def acceptance_length(predicted: Tensor) -> Tensor:
    """Mean tokens per self-speculative step: 1 + the accepted prefix of drafts (Gloeckle et al. 2024, section 3.2).

    Head ``k`` at position ``s`` drafts token ``s + k``; head 1 at ``s + k - 1`` verifies it. The context is the ground
    truth, so this is the acceptance of a model whose earlier drafts were right.

    Args:
        predicted: ``[n, B, S]`` integers, each head's argmax, -1 where the head has no target.
    Returns:
        0-d float32: the mean over the positions where every head, and head 1 at every verifying position, has a
        prediction; 1.0 if there is none.
    """
    n, _, seq_len = predicted.shape
    n_positions = seq_len - n + 1
    if n == 1 or n_positions <= 0:
        return torch.ones((), device=predicted.device)
    draft = torch.stack([predicted[k, :, :n_positions] for k in range(n)])
    verify = torch.stack([predicted[0, :, k : k + n_positions] for k in range(n)])
    measured = ((draft >= 0) & (verify >= 0)).all(0)
    accepted = (draft[1:] == verify[1:]).cumprod(0).sum(0)
    total = (accepted * measured).sum()
    return 1.0 + total.float() / measured.sum().clamp(min=1)
