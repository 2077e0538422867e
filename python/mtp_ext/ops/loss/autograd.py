"""Autograd functions of the losses: gradients precomputed in forward, or logits recomputed in backward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mtp_ext.ops.common.backend import backend_of, can_read
from mtp_ext.ops.common.derivatives import differentiable_once, is_last_backward, link
from mtp_ext.ops.common.result import MultiTokenLoss
from mtp_ext.ops.common.runtime import debug_checks_enabled
from mtp_ext.ops.common.transforms import is_recorded
from mtp_ext.ops.loss import operators, recorded
from mtp_ext.ops.loss.arguments import Gradients, LossCall, Needs


def reduced_loss(call: LossCall, weight: Tensor, hidden: Sequence[Tensor]) -> MultiTokenLoss:
    """Computes the summed or averaged loss and its gradients in one pass."""
    if is_recorded(weight, *hidden):
        return recorded.reduced_loss(call, weight, hidden)
    if _adds_at_once(call):
        return _loss_added_at_once(call, weight, hidden)
    needs = Needs.of(call, weight, hidden)
    with torch.no_grad():
        result, gradients = operators.multi_token_loss(call, weight, hidden, needs)
    return with_gradients(result, gradients, call, weight, hidden)


def _adds_at_once(call: LossCall) -> bool:
    """Returns True if the forward adds the weight's gradient to the caller's buffer.

    float16 adds it in backward: the factor that keeps its gradients from underflowing may be known to the device only.
    """
    return call.grad_scale is not None and torch.is_grad_enabled() and call.compute_dtype != torch.float16


def _loss_added_at_once(call: LossCall, weight: Tensor, hidden: Sequence[Tensor]) -> MultiTokenLoss:
    """Computes the gradients of ``grad_scale * loss``, the weight's in the buffer, and returns the loss."""
    weights, scale, buffer = call.head_weights, call.grad_scale, call.grad_weight_out
    assert scale is not None and buffer is not None
    if weights is None:
        weights = torch.ones(call.n_heads, dtype=torch.float64, device=weight.device)
    needs = Needs.of(call, weight, hidden)
    call = replace(call, head_weights=weights * scale, grad_scale=None)
    with torch.no_grad():
        result, gradients = operators.multi_token_loss(call, weight, hidden, needs, buffer)
    result = with_gradients(result, gradients._replace(weight=None), call, weight, hidden)
    if result.loss.requires_grad:
        result.loss.register_hook(_of_grad_scale)  # type: ignore[no-untyped-call]
    return result._replace(loss=result.loss / scale)


def _of_grad_scale(grad: Tensor) -> Tensor:
    """Checks the gradient of ``grad_scale * loss``, which is 1 up to rounding if the loss receives ``grad_scale``."""
    wrong = (grad - 1).abs() > 1e-6
    if (can_read(grad) or debug_checks_enabled()) and bool(wrong):
        raise ValueError(
            f"grad_scale must be the gradient that the loss receives, which is {grad.item():g} times as large: the "
            "forward has added the weight's gradient with it"
        )
    return torch.where(wrong, torch.nan, grad)


def with_gradients(
    result: MultiTokenLoss, gradients: Gradients, call: LossCall, weight: Tensor, hidden: Sequence[Tensor]
) -> MultiTokenLoss:
    """Attaches the gradients of ``weight``, ``hidden``, and ``call``'s bias and head weights to ``result.loss``."""
    if not torch.is_grad_enabled():
        return result
    loss, _ = PrecomputedGradients.apply(  # type: ignore[no-untyped-call]
        (result.loss,),
        (
            gradients.weight,
            gradients.bias,
            None if call.head_weights is None else result.head_loss,
            *(gradients.hidden or (None,) * len(hidden)),
        ),
        call.grad_weight_out,
        weight,
        call.bias,
        call.head_weights,
        *hidden,
    )
    return result._replace(loss=loss)


class PrecomputedGradients(torch.autograd.Function):
    """A loss with gradients computed in forward; backward returns them, scaled by the incoming gradient.

    Each input gets its whole gradient once, through its own autograd node, so hooks, DDP, FSDP2, clipping and loss
    scaling work as usual. Saved gradients are never scaled in place, because backward may run again.

    Args:
        loss: The loss in a tuple, so that autograd does not treat it as an input.
        gradients: The gradient of each of ``inputs``, or None.
        buffer: Receives the first input's gradient by addition; that input then gets none.
        inputs: The tensors, or None, that the gradients belong to.
    """

    @staticmethod
    def forward(
        ctx: Any,
        loss: tuple[Tensor],
        gradients: tuple[Tensor | None, ...],
        buffer: Tensor | None,
        *inputs: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        ctx.plan = buffer, [None if x is None else x.dtype for x in inputs]
        linked = link(loss[0])
        ctx.save_for_backward(*gradients, linked)
        ctx.set_materialize_grads(False)
        return loss[0], linked

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        (*grads, _), (buffer, dtypes) = ctx.saved_tensors, ctx.plan
        if grad is None:  # only the link was differentiated
            return (None, None, None, *(None for _ in dtypes))
        if buffer is not None and grads[0] is not None:
            torch.ops.mtp_ext._add_scaled_(buffer, grads[0], grad)
            grads[0] = None
        scaled = backend_of(grad.device).scaled(grads, grad, dtypes)
        if is_last_backward():
            return (None, None, None, *scaled)
        # Callers may change the gradients that they get in place; the next backward needs the saved ones.
        unsaved = (x.clone() if x is not None and x is y else x for x, y in zip(scaled, grads, strict=True))
        return (None, None, None, *unsaved)


def row_losses(call: LossCall, weight: Tensor, hidden: Sequence[Tensor]) -> tuple[MultiTokenLoss, Tensor]:
    """Computes the loss from per-row losses, for reduction "none" and for ``return_lse``.

    Returns:
        The result, with ``loss`` reduced as in ``call`` (``[n, B, S]`` for "none"), and lse ``[n, B, S]``.
    """
    if is_recorded(weight, *hidden):
        losses, lse, divisors, result = recorded.row_losses(call, weight, hidden)
    else:
        losses, lse, divisors, *values, _ = RowLosses.apply(call, weight, call.bias, *hidden)  # type: ignore[no-untyped-call]
        result = MultiTokenLoss._make(values)
    scale = losses.new_ones(call.n_heads) if call.head_weights is None else call.head_weights.to(losses.dtype)
    if call.reduction == "none":
        return result._replace(loss=losses * scale.view(-1, 1, 1)), lse
    head_loss = losses.sum((1, 2), dtype=torch.float64) / divisors
    return result._replace(loss=(head_loss * scale).sum().to(losses.dtype)), lse


class RowLosses(torch.autograd.Function):
    """Loss and log-sum-exp of every row; backward recomputes the logits for any incoming gradients (8 N D V FLOP)."""

    @staticmethod
    def forward(ctx: Any, call: LossCall, weight: Tensor, bias: Tensor | None, *hidden: Tensor) -> tuple[Tensor, ...]:
        *tables, result = operators.row_losses(call, weight, hidden)
        ctx.call, tensors = call.without_tensors()
        linked = link(tables[0])
        ctx.save_for_backward(weight, bias, *tensors, *hidden, linked)
        ctx.mark_non_differentiable(tables[2], *result)
        return (*tables, *result, linked)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad_losses: Tensor, grad_lse: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        weight, bias, *tensors, _ = ctx.saved_tensors
        hidden = tensors[LossCall.N_TENSORS :]
        call = replace(ctx.call.with_tensors(tensors[: LossCall.N_TENSORS]), bias=bias)
        _, of_weight, of_bias, *of_hidden = ctx.needs_input_grad
        buffer = call.grad_weight_out
        needs = Needs(any(of_hidden), of_weight or buffer is not None, of_bias)
        grads = operators.row_losses_backward(call.for_backward(grad_losses, grad_lse), weight, hidden, needs, buffer)
        if buffer is not None:
            grads = grads._replace(weight=None)
        return (
            None,
            None if grads.weight is None else grads.weight.to(weight.dtype),
            None if grads.bias is None else grads.bias.to(bias.dtype),
            *(None if g is None else g.to(hidden[0].dtype) for g in grads.hidden or [None] * len(hidden)),
        )
