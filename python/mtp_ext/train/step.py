"""One optimiser step: forward and backward of every micro-batch, clipping, update."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mtp_ext.distributed.ranks import Ranks
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
    ranks: Ranks | None = None,
) -> StepResult:
    """Takes one step on micro-batches, equivalent to one batch of all their rows, over all processes.

    Args:
        model: The model.
        optimizers: Its optimisers.
        batches: The micro-batches.
        compute: Device and precision.
        schedule: As in :class:`mtp_ext.nn.MTPModel`.
        factor: The learning rate as a fraction of its peak.
        weights: The heads' weights in this step.
        ranks: The processes that shard the model, each with its own micro-batches; default this one alone.
    Raises:
        NotFiniteError: The loss or the gradient is not finite; nothing is updated.
    """
    ranks = ranks or Ranks()
    totals = HeadTotals(weights, skips_zeros=True)
    counts = [targets_of_heads(batch, model.config.n_future) for batch in batches]
    for i, (batch, count, share) in enumerate(
        zip(batches, counts, head_weights(counts, weights, ranks), strict=True), 1
    ):
        if ranks.size > 1:
            model.set_requires_gradient_sync(i == len(batches))  # type: ignore[operator]
        totals.add(backward(model, batch, compute, schedule, share.tolist(), count))
    grad_norm = float(optimizers.clip_gradients())
    heads = totals.metrics(ranks.sum)
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


def head_weights(
    counts: Sequence[Sequence[int]], weights: Sequence[float] | None, ranks: Ranks | None = None
) -> list[Tensor]:
    """Computes each micro-batch's head weights, with which the micro-batch losses sum to the loss of the whole batch.

    A head's loss is a mean over its targets, whose number differs between micro-batches and processes, and FSDP2
    averages the processes' gradients.

    Args:
        counts: Targets of each head in each of ``m`` micro-batches.
        weights: Weight of each head in the objective; ``None`` is 1 each.
        ranks: The processes, each with its own counts; default this one alone.
    Returns:
        ``m`` tensors ``[n]`` float64.
    """
    targets = torch.tensor(counts, dtype=torch.float64)  # [m, n]
    objective = torch.ones_like(targets[0]) if weights is None else torch.tensor(weights).double()
    if ranks is None or ranks.size == 1:
        return [objective] if len(counts) == 1 else list(objective * targets / targets.sum(0).clamp(min=1))
    total = ranks.sum(targets.sum(0)).clamp(min=1)
    # A head without targets has loss 0, but has to run where it runs in another process: its weights are sharded.
    return list(objective * targets.clamp(min=1) * ranks.size / total)


def targets_of_heads(batch: Batch, n_future: int) -> list[int]:
    """Counts each head's targets: present, not ignored, and in their position's document."""
    return count_targets(
        batch.labels,
        n_future,
        seq_len=batch.tokens.shape[1],
        document_ids=batch.document_ids,
        ignore_index=IGNORE_INDEX,
    )
