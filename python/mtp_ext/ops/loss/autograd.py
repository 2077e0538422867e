"""The autograd Functions of the losses: operators of :mod:`mtp_ext.ops.loss.operators` with their gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mtp_ext.ops.common.result import MultiTokenLoss
from mtp_ext.ops.loss import operators as library
from mtp_ext.ops.loss.arguments import LossCall, hand_out_grad_weight, scaled, wants_grad


def _bodies(*tensors: Tensor) -> Any:
    """Where the operators are taken from: torch's library where something traces or fakes, else their plain bodies.

    The dispatch of an operator that is written in Python costs 60 us, as much as a small loss.
    """
    plain = all(type(x) in (Tensor, torch.nn.Parameter) for x in tensors)
    return library if plain and not torch.compiler.is_compiling() else library.operators


class MultiTokenLossFunction(torch.autograd.Function):
    """Takes all gradients in the forward (6 N D V FLOP); the backward only hands them out, scaled."""

    @staticmethod
    def forward(
        ctx: Any,
        call: LossCall,
        needs: dict[str, bool],
        weight: Tensor,
        bias: Tensor | None,
        head_weights: Tensor | None,
        *hidden: Tensor,
    ) -> tuple[Tensor, ...]:
        tensor, number = call.normalizers()
        *result, grad_weight, grad_bias, grad_hidden = _bodies(weight, *hidden).multi_token_loss(
            list(hidden),
            weight,
            bias,
            *call.tensors(),
            head_weights,
            tensor,
            normalizer=number,
            with_metrics=call.with_metrics,
            **call.options(),
            **needs,
        )
        ctx.buffer, ctx.needs = call.row.grad_weight_out, needs
        ctx.n_hidden, ctx.hidden_dtype = len(hidden), hidden[0].dtype
        ctx.dtypes = [None if x is None else x.dtype for x in (weight, bias, head_weights)]
        ctx.save_for_backward(grad_weight, grad_bias, result[1], *grad_hidden)
        ctx.mark_non_differentiable(*result[1:])
        return tuple(result)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        grad_weight, grad_bias, head_loss, *grad_hidden = ctx.saved_tensors
        weight_dtype, bias_dtype, head_weights_dtype = ctx.dtypes
        return (
            None,
            None,
            hand_out_grad_weight(grad_weight, grad_loss, ctx.buffer, weight_dtype)
            if ctx.needs["need_weight"]
            else None,
            scaled(grad_bias, grad_loss, bias_dtype) if ctx.needs["need_bias"] else None,
            None if head_weights_dtype is None else scaled(head_loss, grad_loss, head_weights_dtype),
            *_or_nones([scaled(g, grad_loss, ctx.hidden_dtype) for g in grad_hidden], ctx.n_hidden),
        )


class RowLossesFunction(torch.autograd.Function):
    """Loss and log-sum-exp of every row; the backward forms the logits again, for any incoming gradients (8 N D V)."""

    @staticmethod
    def forward(
        ctx: Any, call: LossCall, needs: dict[str, bool], weight: Tensor, bias: Tensor | None, *hidden: Tensor
    ) -> tuple[Tensor, ...]:
        tensor, number = call.normalizers()
        outputs: tuple[Tensor, ...] = _bodies(weight, *hidden).row_losses(
            list(hidden),
            weight,
            bias,
            *call.tensors(),
            tensor,
            normalizer=number,
            with_metrics=call.with_metrics,
            **call.options(),
        )
        ctx.call, ctx.needs = call, needs
        ctx.save_for_backward(weight, bias, *hidden)
        ctx.mark_non_differentiable(*outputs[2:])
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_losses: Tensor, grad_lse: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        weight, bias, *hidden = ctx.saved_tensors
        needs = ctx.needs
        grad_weight, grad_bias, grad_hidden = _bodies(weight, *hidden).row_losses_backward(
            hidden, weight, bias, *ctx.call.tensors(), grad_losses, grad_lse, **ctx.call.options(), **needs
        )
        one = grad_losses.new_ones(())
        buffer = ctx.call.row.grad_weight_out
        return (
            None,
            None,
            hand_out_grad_weight(grad_weight, one, buffer, weight.dtype) if needs["need_weight"] else None,
            grad_bias.to(bias.dtype) if needs["need_bias"] else None,
            *_or_nones([g.to(hidden[0].dtype) for g in grad_hidden], len(hidden)),
        )


def _or_nones(grads: Sequence[Tensor], count: int) -> Sequence[Tensor | None]:
    """The gradients, or as many times None if none were formed."""
    return grads or [None] * count


def needs_of(call: LossCall, weight: Tensor, hidden: tuple[Tensor, ...]) -> dict[str, bool]:
    """Which gradients a call has to form."""
    buffer = call.row.grad_weight_out is not None and torch.is_grad_enabled()
    return {
        "need_hidden": any(wants_grad(h) for h in hidden),
        "need_weight": wants_grad(weight) or buffer,
        "need_bias": wants_grad(call.row.bias),
    }


def reduced_loss(
    call: LossCall, weight: Tensor, head_weights: Tensor | None, hidden: tuple[Tensor, ...]
) -> MultiTokenLoss:
    """The loss summed or averaged in the pass that forms its gradients."""
    outputs = MultiTokenLossFunction.apply(  # type: ignore[no-untyped-call]
        call, needs_of(call, weight, hidden), weight, call.row.bias, head_weights, *hidden
    )
    return MultiTokenLoss(*outputs)


def row_losses(
    call: LossCall, weight: Tensor, head_weights: Tensor | None, hidden: tuple[Tensor, ...]
) -> tuple[MultiTokenLoss, Tensor]:
    """The loss by way of its rows: for reduction "none", and where the log-sum-exp is wanted.

    Returns:
        The result, its ``loss`` reduced as the call says (``[n, B, S]`` for "none"), and lse ``[n, B, S]``.
    """
    losses, lse, denominator, *metrics = RowLossesFunction.apply(  # type: ignore[no-untyped-call]
        call, needs_of(call, weight, hidden), weight, call.row.bias, *hidden
    )
    scale = losses.new_ones(call.n_heads) if head_weights is None else head_weights.to(losses.dtype)
    if call.row.reduction == "none":
        return MultiTokenLoss(losses * scale.view(-1, 1, 1), *metrics), lse
    head_loss = losses.sum((1, 2), dtype=torch.float64) / torch.where(denominator != 0, denominator, 1)
    return MultiTokenLoss((head_loss * scale).sum().to(losses.dtype), *metrics), lse
