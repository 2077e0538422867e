"""All heads forward under autograd, then one fused loss over the rows of all of them: fastest for small batches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mtp_ext.nn.schedules.head_stack import HeadStack, head_outputs, scaled
from mtp_ext.nn.schedules.step_loss import StepLoss, step_loss
from mtp_ext.nn.schedules.targets import Targets
from mtp_ext.ops.common.result import MultiTokenLoss


def joint_loss(heads: HeadStack, hidden: Tensor, weight: Tensor, context: Any, targets: Targets) -> MultiTokenLoss:
    """Loss and metrics of all heads; arguments as of ``multi_token_loss``."""
    with_grad = torch.is_grad_enabled()
    loss = step_loss(
        heads, hidden, weight, targets, need_grad_hidden=with_grad, need_grad_weight=with_grad and weight.requires_grad
    )
    outputs = head_outputs(heads, hidden, context, loss.heads, targets.detach_heads)
    inputs = (weight, targets.head_weights, *outputs.values())
    return MultiTokenLoss(*JointFunction.apply(loss, tuple(outputs), *inputs))  # type: ignore[no-untyped-call]


class JointFunction(torch.autograd.Function):
    """The fused loss of given outputs: gradients are taken in the forward and handed out in the backward."""

    @staticmethod
    def forward(
        ctx: Any,
        loss: StepLoss,
        heads: tuple[int, ...],
        weight: Tensor,
        head_weights: Tensor | None,
        *outputs: Tensor,
    ) -> tuple[Tensor, ...]:
        grads = loss.add(dict(zip(heads, outputs, strict=True)))
        result = loss.result()
        ctx.dtypes = (weight.dtype, None if head_weights is None else head_weights.dtype)
        head_loss = result.head_loss if ctx.needs_input_grad[3] else None
        ctx.save_for_backward(loss.grad_weight, head_loss, *(grads[k] for k in heads))
        ctx.mark_non_differentiable(*result[1:])
        return tuple(result)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        weight, head_weights, *outputs = scaled(ctx.saved_tensors, grad_loss)
        weight_dtype, head_weights_dtype = ctx.dtypes
        return (
            None,
            None,
            None if weight is None else weight.to(weight_dtype),
            None if head_weights is None else head_weights.to(head_weights_dtype),
            *outputs,
        )
