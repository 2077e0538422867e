"""Measures of the heads that come from the pass over the logits, without another GEMM."""

from __future__ import annotations

import torch
from torch import Tensor


def acceptance_length(predicted: Tensor) -> Tensor:
    """Mean tokens per self-speculative step: 1 + the accepted prefix of drafts (Gloeckle et al. 2024, section 3.2).

    Head ``k`` at position ``s`` drafts token ``s + k``; head 1 at ``s + k - 1`` verifies it. The contexts are the
    labels' own, so this is the acceptance of a model whose earlier drafts were right.

    Args:
        predicted: ``[n, B, S]`` integers, each head's argmax, -1 where the head has no target.
    Returns:
        0-d float32: the mean over the positions at which all heads, and head 1 at all verifying positions, predicted
        something; 1.0 where there is no such position.
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


def top1(predicted: Tensor, labels: Tensor, n_valid: Tensor, *, seq_len: int, first_shift: int) -> Tensor:
    """The fraction of valid targets that each head ranks first.

    Args:
        predicted: ``[n, B, S]``, -1 where the head has no target.
        labels: ``[B, S']``, unshifted.
        n_valid: ``[n]``.
    Returns:
        ``[n]`` float32; 0 for a head without targets.
    """
    label_len = labels.shape[1]
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
