"""One optimiser step: forward and backward of every micro-batch, clipping, update."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mtp_ext.nn import MTPModel
from mtp_ext.ops import MultiTokenLoss, count_targets
from mtp_ext.train.data import IGNORE_INDEX, Batch
from mtp_ext.train.device import Compute
from mtp_ext.train.metrics import HeadMetrics, HeadTotals, shown
from mtp_ext.train.optim import Optimizers


class NotFiniteError(RuntimeError):
    """A loss or the gradient norm is not finite; the parameters have not been updated."""


@dataclass(frozen=True)
class StepResult:
    """The measurements of a step.

    Attributes:
        heads: The loss over all micro-batches, before the update.
        grad_norm: Norm of the whole gradient before clipping.
        head_weights: The heads' weights in the objective.
        factor: The learning rate as a fraction of its peak.
    """

    heads: HeadMetrics
    grad_norm: float
    head_weights: tuple[float, ...]
    factor: float


def train_step(
    model: MTPModel,
    optimizers: Optimizers,
    batches: Sequence[Batch],
    compute: Compute,
    schedule: str,
    factor: float,
    weights: Sequence[float],
) -> StepResult:
    """Takes one step on micro-batches, equivalent to one batch of all their rows.

    Args:
        model: The model.
        optimizers: Its optimisers.
        batches: The micro-batches.
        compute: Device and precision.
        schedule: As in :class:`mtp_ext.nn.MTPModel`.
        factor: The learning rate as a fraction of its peak.
        weights: The heads' weights in this step.
    Raises:
        NotFiniteError: The loss or the gradient is not finite; nothing is updated.
    """
    totals = HeadTotals(weights, skips_zeros=True)
    counts = [targets_of_heads(batch, model.config.n_future) for batch in batches]
    for batch, count, share in zip(batches, counts, head_weights(counts, weights), strict=True):
        totals.add(backward(model, batch, compute, schedule, share.tolist(), count))
    grad_norm = float(optimizers.clip_gradients())
    heads = totals.metrics()
    if not (heads.is_finite and math.isfinite(grad_norm)):
        losses = ", ".join(shown(x, ".4g") for x in heads.head_loss)
        raise NotFiniteError(f"the loss is not finite (per head: {losses}; gradient norm: {grad_norm:.4g})")
    optimizers.step(factor)
    return StepResult(heads, grad_norm, tuple(weights), factor)


def backward(
    model: MTPModel, batch: Batch, compute: Compute, schedule: str, weights: Sequence[float], counts: list[int]
) -> MultiTokenLoss:
    """Adds a micro-batch's gradients to those of the parameters.

    Args:
        model, batch, compute, schedule: As in :func:`train_step`.
        weights: The heads' weights; floats, not a device tensor: heads of weight 0 are then skipped.
        counts: The heads' targets.
    """
    tokens, labels, document_ids = (t.to(compute.device, non_blocking=True) for t in batch)
    with compute.autocast():
        result = model(
            tokens,
            labels=labels,
            document_ids=document_ids,
            head_weights=weights,
            schedule=schedule,
            max_valid=counts,
        )
    assert isinstance(result, MultiTokenLoss)
    result.loss.backward()  # type: ignore[no-untyped-call]
    return result


def head_weights(counts: Sequence[Sequence[int]], weights: Sequence[float] | None) -> list[Tensor]:
    """Computes each micro-batch's head weights, with which the micro-batch losses sum to the loss of the whole batch.

    A head's loss is a mean over its targets, whose number differs between micro-batches.

    Args:
        counts: Targets of each head in each of ``m`` micro-batches.
        weights: Weight of each head in the objective; ``None`` is 1 each.
    Returns:
        ``m`` tensors ``[n]`` float64.
    """
    targets = torch.tensor(counts, dtype=torch.float64)  # [m, n]
    objective = torch.ones_like(targets[0]) if weights is None else torch.tensor(weights).double()
    if len(counts) == 1:
        return [objective]
    return list(objective * targets / targets.sum(0).clamp(min=1))


def targets_of_heads(batch: Batch, n_future: int) -> list[int]:
    """Counts each head's targets: present, not ignored, and in their position's document."""
    return count_targets(
        batch.labels,
        n_future,
        seq_len=batch.tokens.shape[1],
        document_ids=batch.document_ids,
        ignore_index=IGNORE_INDEX,
    )
