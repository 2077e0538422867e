"""What the multi-token loss returns."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class MultiTokenLoss(NamedTuple):
    """The loss of ``n`` heads and what the same pass over the logits measured. Only ``loss`` is differentiable.

    Attributes:
        loss: 0-d, ``sum_k head_weights[k] * head_loss[k]``, in nats.
        head_loss: ``[n]``, each head's loss over its valid targets divided by the normalizer; 0 without targets.
        n_valid: ``[n]`` int64, the number of targets that count (present, not ignored, in their position's document,
            of non-zero weight).
        top1: ``[n]`` float32, the fraction of valid targets that the head ranks first.
        accept_length: 0-d float32, the mean number of tokens that one self-speculative step would emit with these
            logits: 1 + the longest prefix of heads ``2..n`` whose argmax equals head 1's argmax at the position that
            it would verify. Over positions at which every head has a valid target and a verifying position; 1.0 where
            there is none.
    """

    loss: Tensor
    head_loss: Tensor
    n_valid: Tensor
    top1: Tensor
    accept_length: Tensor
