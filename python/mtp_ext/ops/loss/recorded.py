"""The losses as registered operators with autograd formulas, for calls that torch records or transforms.

The gradients are outputs of the operators. They are differentiable to autograd, so that a second derivative reaches the
formula, which raises.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from mtp_ext.ops.common.derivatives import NO_SECOND_DERIVATIVE
from mtp_ext.ops.common.result import MultiTokenLoss
from mtp_ext.ops.common.transforms import Operator, is_transformed
from mtp_ext.ops.loss import operators
from mtp_ext.ops.loss.arguments import Gradients, LossCall, Needs


def reduced_loss(call: LossCall, weight: Tensor, hidden: Sequence[Tensor]) -> MultiTokenLoss:
    """As :func:`mtp_ext.ops.loss.autograd.reduced_loss`."""
    result, _ = _REDUCED(*operators.arguments(call, weight, hidden, _needs(call, weight, hidden)))
    loss, head_loss, *measured = result
    return MultiTokenLoss(loss, head_loss.detach(), *measured)


def row_losses(
    call: LossCall, weight: Tensor, hidden: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor, MultiTokenLoss]:
    """As :func:`mtp_ext.ops.loss.operators.row_losses`, differentiable."""
    needs = _needs(call, weight, hidden)
    *tables, result = _ROWS(*operators.arguments(replace(call, head_weights=None), weight, hidden, needs))
    losses, lse, divisors = tables
    return losses, lse, divisors, MultiTokenLoss._make(result)


def _needs(call: LossCall, weight: Tensor, hidden: Sequence[Tensor]) -> Needs:
    if not (is_transformed() and torch.is_grad_enabled()):
        return Needs.of(call, weight, hidden)
    if call.grad_weight_out is not None:
        raise ValueError("grad_weight_out must be None within torch.func, whose transforms return every gradient")
    return Needs(True, True, call.bias is not None)  # requires_grad says nothing of the levels of a nested transform


def _save_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[list[Tensor], list[Tensor]]) -> None:
    hidden, weight, bias, head_weights, buffer, *_, needs = inputs
    (_, head_loss, *measured), gradients = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*measured)
    ctx.save_for_backward(head_loss, *gradients)
    ctx.buffer, ctx.needs = buffer, Needs(*needs)
    ctx.dtypes = [None if x is None else x.dtype for x in (weight, bias, head_weights, hidden[0])]


def _scaled_gradients(ctx: Any, of_result: list[Tensor | None], of_gradients: list[Tensor | None]) -> tuple[Any, ...]:
    by, of_head_loss, *_ = of_result
    if of_head_loss is not None or any(x is not None for x in of_gradients):
        raise RuntimeError(NO_SECOND_DERIVATIVE)
    head_loss, *saved = ctx.saved_tensors
    grads = operators.unpacked_gradients(saved, ctx.needs)
    of_weight, of_bias, of_head_weights, of_hidden = ctx.dtypes

    def scaled(x: Tensor | None, dtype: torch.dtype | None) -> Tensor | None:
        return None if x is None or by is None or dtype is None else (x.to(by.dtype) * by).to(dtype)

    if ctx.buffer is not None and grads.weight is not None and by is not None:
        torch.ops.mtp_ext._add_scaled_(ctx.buffer, grads.weight, by)
        grads = grads._replace(weight=None)
    return _of_arguments(
        ctx,
        Gradients(
            weight=scaled(grads.weight, of_weight),
            bias=scaled(grads.bias, of_bias),
            hidden=[scaled(x, of_hidden) for x in grads.hidden],
        ),
        scaled(head_loss, of_head_weights),
    )


def _save_arguments(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    _, _, divisors, result = output
    ctx.mark_non_differentiable(divisors, *result)
    hidden, weight, bias, _, buffer, tensors, *ctx.constants, needs = inputs
    leaves, ctx.structure = tree_flatten((hidden, weight, bias, tensors))
    ctx.save_for_backward(*leaves)
    ctx.buffer, ctx.needs = buffer, Needs(*needs)


def _recomputed_gradients(ctx: Any, of_losses: Tensor, of_lse: Tensor, *_: Any) -> tuple[Any, ...]:
    hidden, weight, bias, tensors = tree_unflatten(ctx.saved_tensors, ctx.structure)
    call = operators.unpacked_call(bias, None, tensors, *ctx.constants).for_backward(of_losses, of_lse)
    found = _ROWS_BACKWARD(*operators.arguments(call, weight, hidden, ctx.needs))
    grads = operators.unpacked_gradients(found, ctx.needs)
    if ctx.buffer is not None and grads.weight is not None:
        torch.ops.mtp_ext._add_scaled_(ctx.buffer, grads.weight, of_losses.new_ones(()))
        grads = grads._replace(weight=None)
    return _of_arguments(
        ctx,
        Gradients(
            weight=None if grads.weight is None else grads.weight.to(weight.dtype),
            bias=None if grads.bias is None else grads.bias.to(bias.dtype),
            hidden=[None if x is None else x.to(hidden[0].dtype) for x in grads.hidden],
        ),
    )


def _save_nothing(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    pass


def _refuse(ctx: Any, *_: Any) -> tuple[Any, ...]:
    raise RuntimeError(NO_SECOND_DERIVATIVE)


def _of_arguments(ctx: Any, grads: Gradients, of_head_weights: Tensor | None = None) -> tuple[Any, ...]:
    """Returns the gradients in the order of the operators' arguments.

    Raises:
        RuntimeError: A gradient is wanted that is not there.
    """
    hidden, weight, bias, _, *others = ctx.needs_input_grad
    wanted = Needs(any(hidden), weight, bias)
    if any(w and not n for w, n in zip(wanted, ctx.needs, strict=True)) or any(tree_flatten(others)[0]):
        raise RuntimeError(
            "a loss of mtp_ext has no gradient for an argument that requires one: token_weights, class_weights and "
            "normalizer never have one; the others have it in graphs that were recorded where they required grad"
        )
    of_hidden = list(grads.hidden) or [None] * len(hidden)
    nothing = ([None] * len(x) if isinstance(x, list) else None for x in others)
    return of_hidden, grads.weight, grads.bias, of_head_weights, *nothing


_REDUCED = Operator(operators._multi_token_loss, _save_gradients, _scaled_gradients)
_ROWS = Operator(operators._row_losses, _save_arguments, _recomputed_gradients)
_ROWS_BACKWARD = Operator(operators._row_losses_backward, _save_nothing, _refuse)
