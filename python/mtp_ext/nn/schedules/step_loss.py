"""The interface of the schedules to the fused loss: a head's output goes in, its gradient comes out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from mtp_ext.nn.schedules.head_stack import HeadStack
from mtp_ext.nn.schedules.one_row_loss import OneRowLoss
from mtp_ext.nn.schedules.targets import Targets
from mtp_ext.ops.common.result import MultiTokenLoss
from mtp_ext.ops.common.runtime import outside_graphs
from mtp_ext.ops.loss.accumulator import HeadLossAccumulator
from mtp_ext.ops.loss.arguments import Needs


class StepLoss(Protocol):
    """Losses, metrics and gradients of one step, outside autograd."""

    heads: frozenset[int]
    """The heads whose outputs must be added, each once."""

    @property
    def grad_weight(self) -> Tensor | None:
        """The gradient of the unembedding, in its shape; None if not asked for."""

    @property
    def grad_bias(self) -> Tensor | None:
        """The gradient of its bias, ``[V]``, likewise."""

    def add(self, hidden: Mapping[int, Tensor]) -> dict[int, Tensor | None]:
        """Adds normed outputs ``[B, S, D]`` by head; returns their gradients."""

    def result(self) -> MultiTokenLoss:
        """Returns loss and metrics, once all heads have been added."""


@outside_graphs
def step_loss(
    heads: HeadStack,
    hidden: Tensor,
    weight: Tensor,
    targets: Targets,
    *,
    with_grad: bool,
    need_grad_hidden: bool,
) -> StepLoss:
    """Returns the loss that suits the heads.

    Args:
        heads: The heads.
        hidden: ``[B, S, D]``, for its dtype.
        weight: ``[V, D]`` or ``[n, V, D]``.
        targets: Labels and their options.
        with_grad: Compute the gradients that weight and bias require.
        need_grad_hidden: Compute those of the heads' outputs.
    """
    call, active = targets.of_hidden(hidden), targets.active
    # Heads with the same output may still differ in what they detach; then each is added by itself.
    alike = heads.one_row and weight.dim() == 2 and not targets.detach_heads and not call.detach_weight
    kind = OneRowLoss if alike and active and OneRowLoss.takes(call) else HeadLossAccumulator
    needs = Needs(
        hidden=need_grad_hidden,
        weight=with_grad and weight.requires_grad,
        bias=with_grad and call.bias is not None and call.bias.requires_grad,
    )
    return kind(call, weight, needs, active)
