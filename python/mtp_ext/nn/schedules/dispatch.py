"""Three schedules of the heads' forwards, losses and backwards, with the same loss and gradients.

- ``sequential`` (Gloeckle et al. 2024, section 2 and figure S11): each head's forward, loss and backward before the
  next head's, all within the model's forward: see :mod:`mtp_ext.nn.schedules.sequential`.
- ``joint``: all heads forward under autograd, then one fused loss over ``n * B * S`` rows.
- ``autograd``: all heads forward, full logits, plain torch. The reference.

In ``torch.export``, ``make_fx`` and the transforms of ``torch.func``, which need the step as one differentiable graph,
the first two are one loss over all rows as well (:func:`mtp_ext.nn.schedules.joint.recorded_loss`).

Heads run in the same order in all three, so that dropout draws the same numbers. A head of weight 0 does not run unless
a later head of its chain reads it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mtp_ext.nn.schedules.autograd import autograd_loss
from mtp_ext.nn.schedules.ddp import reach_all
from mtp_ext.nn.schedules.head_stack import HeadStack
from mtp_ext.nn.schedules.joint import joint_loss, recorded_loss
from mtp_ext.nn.schedules.sequential import sequential_loss
from mtp_ext.nn.schedules.targets import Targets
from mtp_ext.ops.common.result import MultiTokenLoss
from mtp_ext.ops.common.transforms import is_transformed, is_written_down

SCHEDULES = {"sequential": sequential_loss, "joint": joint_loss, "autograd": autograd_loss}


def multi_token_loss(
    heads: HeadStack, hidden: Tensor, weight: Tensor, context: Any, targets: Targets, schedule: str
) -> MultiTokenLoss:
    """Computes loss and metrics of all heads with ``schedule``.

    Args:
        heads: The heads.
        hidden: ``[B, S, D]``, the trunk's output.
        weight: ``[V, D]``, the unembedding, or ``[n, V, D]``.
        context: Positions and visibility of this forward.
        targets: Labels and their options.
        schedule: ``"sequential"``, ``"joint"`` or ``"autograd"``.
    """
    check_schedule(schedule)
    one_graph = schedule != "autograd" and (is_transformed() or is_written_down())
    loss_of = recorded_loss if one_graph else SCHEDULES[schedule]
    result = loss_of(heads, hidden, weight, context, targets)
    return reach_all(result, heads, hidden, weight, targets)


def check_schedule(schedule: str) -> None:
    """Raises ValueError for an unknown schedule."""
    if not isinstance(schedule, str) or schedule not in SCHEDULES:
        raise ValueError(f"schedule must be 'sequential', 'joint' or 'autograd', got {schedule!r}")
