"""All heads forward under autograd, then one fused loss over all their rows: fastest for small batches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mtp_ext.nn.schedules.head_stack import HeadStack, head_outputs
from mtp_ext.nn.schedules.step_loss import StepLoss, step_loss
from mtp_ext.nn.schedules.targets import Targets
from mtp_ext.ops.common.result import MultiTokenLoss
from mtp_ext.ops.common.runtime import outside_graphs
from mtp_ext.ops.loss.arguments import Gradients
from mtp_ext.ops.loss.autograd import reduced_loss, with_gradients


def joint_loss(heads: HeadStack, hidden: Tensor, weight: Tensor, context: Any, targets: Targets) -> MultiTokenLoss:
    """Computes loss and metrics of all heads; arguments as in ``multi_token_loss``."""
    with_grad = torch.is_grad_enabled()
    loss = step_loss(heads, hidden, weight, targets, with_grad=with_grad, need_grad_hidden=with_grad)
    outputs = head_outputs(heads, hidden, context, loss.heads, targets.detach_heads)
    return _loss_of(loss, outputs, weight, targets)


def recorded_loss(heads: HeadStack, hidden: Tensor, weight: Tensor, context: Any, targets: Targets) -> MultiTokenLoss:
    """:func:`joint_loss` by the registered operator, for steps that torch writes down or transforms. All heads run."""
    outputs = head_outputs(heads, hidden, context, detach_heads=targets.detach_heads)
    return reduced_loss(targets.of_hidden(hidden), weight, list(outputs.values()))


@outside_graphs
def _loss_of(loss: StepLoss, outputs: dict[int, Tensor], weight: Tensor, targets: Targets) -> MultiTokenLoss:
    """Adds all outputs at once and attaches their gradients."""
    with torch.no_grad():
        grads = loss.add(outputs)
        result = loss.result()
    gradients = Gradients(weight=loss.grad_weight, bias=loss.grad_bias, hidden=[grads[k] for k in outputs])
    return with_gradients(result, gradients, targets.call, weight, list(outputs.values()))
