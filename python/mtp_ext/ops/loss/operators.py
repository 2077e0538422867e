"""The fused loss as torch custom operators: one node for ``torch.compile``, traceable with fake tensors.

Each operator takes a packed :class:`LossCall` and values, and returns gradients as values; ``recorded.py`` has their
autograd formulas. Outputs that were not asked for are empty. Eager calls use the function of the same name directly:
the dispatcher costs 60 us for an operator written in Python.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mtp_ext.ops.common.backend import backend_of
from mtp_ext.ops.common.result import MultiTokenLoss, RowTables, empty_metrics, head_metrics
from mtp_ext.ops.loss import native_cpu
from mtp_ext.ops.loss.accumulator import HeadLossAccumulator, runs_natively
from mtp_ext.ops.loss.arguments import Gradients, LossCall, Needs, PackedCall, WeightSums, saved_grad_dtype
from mtp_ext.ops.loss.chunk_size import fits_one_chunk
from mtp_ext.ops.loss.row_kernels import prepared

# hidden is the n heads' [B, S, D], or one tensor [n, B, S, D]. What autograd differentiates stands apart from the other
# tensors, because it does not look into lists that hold None; the rest is LossCall.pack().
_CALL = (
    "Tensor[] hidden, Tensor weight, Tensor? bias, Tensor? head_weights, Tensor? grad_weight_out, Tensor?[] tensors, "
    "float[] options, SymInt[] sizes, int[] detach_weight, SymInt[] max_valid, ScalarType compute_dtype, str group_name"
)


def _accumulated(
    call: LossCall, weight: Tensor, hidden: Sequence[Tensor], needs: Needs, buffer: Tensor | None = None
) -> tuple[HeadLossAccumulator, Gradients]:
    """Runs all heads through the accumulator."""
    dtype = weight.dtype if fits_one_chunk(call, weight) else None
    sums = WeightSums.of(call, weight, needs, buffer=buffer, dtype=dtype)
    backend_of(weight.device).check_built()
    with torch.autocast(weight.device.type, enabled=False):
        accumulator = HeadLossAccumulator(call, weight, needs, sums=sums)
        grads = accumulator.add_all(hidden)
        return accumulator, Gradients(accumulator.grad_weight, accumulator.grad_bias, grads)


def _natively(
    call: LossCall, weight: Tensor, hidden: Sequence[Tensor], needs: Needs, buffer: Tensor | None = None
) -> tuple[native_cpu.HeadSums, RowTables, Gradients]:
    """Runs all heads in one native call."""
    call = prepared(call)
    native_cpu.check_max_valid(call, weight)
    sums = None if buffer is None else WeightSums.of(call, weight, needs, buffer=buffer)
    one_chunk = needs.weight and fits_one_chunk(call, weight)
    return native_cpu.fused_loss(call, weight, hidden, needs, sums, one_chunk=one_chunk)


def _result(call: LossCall, sums: native_cpu.HeadSums, tables: RowTables) -> MultiTokenLoss:
    measured = empty_metrics(sums.loss, None)
    if call.with_metrics:
        measured = head_metrics(tables, call.labels, sums.n_valid, call.first_shift)
    return MultiTokenLoss(loss=sums.loss, head_loss=sums.head_loss, n_valid=sums.n_valid, **measured)


def multi_token_loss(
    call: LossCall, weight: Tensor, hidden: Sequence[Tensor], needs: Needs, buffer: Tensor | None = None
) -> tuple[MultiTokenLoss, Gradients]:
    """Computes loss, metrics and gradients in one pass: 6 N D V FLOP, or 2 N D V without gradients.

    The weight's gradient is added to ``buffer``, if there is one.
    """
    if runs_natively(call, weight):
        sums, tables, grads = _natively(call, weight, hidden, needs, buffer)
        return _result(call, sums, tables), grads
    accumulator, grads = _accumulated(call, weight, hidden, needs, buffer)
    return accumulator.result(), grads


def row_losses(
    call: LossCall, weight: Tensor, hidden: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor, MultiTokenLoss]:
    """Computes the (token-weighted) loss and log-sum-exp of every row, without gradients: 2 N D V FLOP.

    Returns:
        Losses and log-sum-exp ``[n, B, S]``, the divisor of each head's sum ``[n]``, and the reduced result.
    """
    none = Needs(False, False, False)
    if runs_natively(call, weight):
        sums, tables, _ = _natively(call, weight, hidden, none)
        return tables.loss, tables.lse, sums.divisors, _result(call, sums, tables)
    accumulator, _ = _accumulated(call, weight, hidden, none)
    tables = accumulator.row_tables()
    return tables.loss, tables.lse, accumulator.divisors.clone(), accumulator.result()


def row_losses_backward(
    call: LossCall, weight: Tensor, hidden: Sequence[Tensor], needs: Needs, buffer: Tensor | None = None
) -> Gradients:
    """Computes the gradients from the incoming ones in ``call``; recomputes the logits: 6 N D V FLOP.

    The weight's gradient is added to ``buffer``, if there is one.
    """
    if runs_natively(call, weight):
        return _natively(call, weight, hidden, needs, buffer)[2]
    return _accumulated(call, weight, hidden, needs, buffer)[1]


def _or_empty(grads: Gradients, call: LossCall, like: Tensor) -> list[Tensor]:
    """Packs gradients as an operator output, which cannot hold None; :func:`unpacked_gradients` is the inverse.

    The weight's gradient is widened: while tracing, the number of chunks may be unknown.
    """
    weight = None if grads.weight is None else grads.weight.to(call.acc_dtype)
    return [like.new_empty(0) if x is None else x for x in (weight, grads.bias, *grads.hidden)]


def unpacked_gradients(outputs: list[Tensor], needs: Needs) -> Gradients:
    """Unpacks the gradients from an operator's outputs."""
    weight, bias, *hidden = outputs
    return Gradients(weight if needs.weight else None, bias if needs.bias else None, hidden)


def arguments(call: LossCall, weight: Tensor, hidden: Sequence[Tensor], needs: Needs) -> tuple[Any, ...]:
    """Packs the arguments of an operator."""
    packed = replace(call, bias=None, head_weights=None).pack()
    return list(hidden), weight, call.bias, call.head_weights, call.grad_weight_out, *packed, list(needs)


def unpacked_call(bias: Tensor | None, head_weights: Tensor | None, *packed: Any) -> LossCall:
    """Unpacks a call, without the buffer, from an operator's arguments."""
    return replace(LossCall.unpack(PackedCall._make(packed)), bias=bias, head_weights=head_weights)


def split(call_and_needs: tuple[Any, ...]) -> tuple[LossCall, Needs]:
    """Unpacks the call and the needs from an operator's arguments behind the weight."""
    bias, head_weights, _, *packed, needs = call_and_needs
    return unpacked_call(bias, head_weights, *packed), Needs(*needs)


@torch.library.custom_op(
    "mtp_ext::_multi_token_loss",
    mutates_args=(),
    schema=f"({_CALL}, bool[] needs) -> (Tensor[] result, Tensor[] gradients)",
)
def _multi_token_loss(hidden: list[Tensor], weight: Tensor, *call_and_needs: Any) -> tuple[list[Tensor], list[Tensor]]:
    call, needs = split(call_and_needs)
    result, grads = multi_token_loss(call, weight, hidden, needs)
    return list(result), _or_empty(grads, call, weight)


@_multi_token_loss.register_fake
def _(hidden: list[Tensor], weight: Tensor, *call_and_needs: Any) -> tuple[list[Tensor], list[Tensor]]:
    call, needs = split(call_and_needs)
    return list(_fake_result(call, weight)), _fake_gradients(call, weight, hidden, needs)


@torch.library.custom_op(
    "mtp_ext::_row_losses",
    mutates_args=(),
    schema=f"({_CALL}, bool[] needs) -> (Tensor losses, Tensor lse, Tensor divisors, Tensor[] result)",
)
def _row_losses(
    hidden: list[Tensor], weight: Tensor, *call_and_needs: Any
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    losses, lse, divisors, result = row_losses(split(call_and_needs)[0], weight, hidden)
    return losses, lse, divisors, list(result)


@_row_losses.register_fake
def _(hidden: list[Tensor], weight: Tensor, *call_and_needs: Any) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    call, _ = split(call_and_needs)
    table = weight.new_empty((call.n_heads, call.labels.shape[0], call.seq_len), dtype=call.acc_dtype)
    divisors = weight.new_empty(call.n_heads, dtype=call.acc_dtype)
    return table, torch.empty_like(table), divisors, list(_fake_result(call, weight))


@torch.library.custom_op(
    "mtp_ext::_row_losses_backward",
    mutates_args=(),
    schema=f"({_CALL}, bool[] needs) -> Tensor[] gradients",
)
def _row_losses_backward(hidden: list[Tensor], weight: Tensor, *call_and_needs: Any) -> list[Tensor]:
    call, needs = split(call_and_needs)
    return _or_empty(row_losses_backward(call, weight, hidden, needs), call, weight)


@_row_losses_backward.register_fake
def _(hidden: list[Tensor], weight: Tensor, *call_and_needs: Any) -> list[Tensor]:
    call, needs = split(call_and_needs)
    return _fake_gradients(call, weight, hidden, needs)


@torch.library.custom_op(
    "mtp_ext::_add_scaled_", mutates_args=("buffer",), schema="(Tensor(a!) buffer, Tensor grad, Tensor by) -> ()"
)
def _add_scaled_(buffer: Tensor, grad: Tensor, by: Tensor) -> None:
    """Computes ``buffer += grad * by`` with a 0-d ``by``."""
    buffer.addcmul_(grad, by.to(grad.dtype))


@_add_scaled_.register_fake
def _(buffer: Tensor, grad: Tensor, by: Tensor) -> None:
    return None


def _fake_result(call: LossCall, weight: Tensor) -> MultiTokenLoss:
    n_heads = call.n_heads
    return MultiTokenLoss(
        loss=weight.new_empty((), dtype=call.acc_dtype),
        head_loss=weight.new_empty(n_heads, dtype=call.acc_dtype),
        n_valid=weight.new_empty(n_heads, dtype=torch.int64),
        **empty_metrics(weight, n_heads if call.with_metrics else None),
    )


def _fake_gradients(call: LossCall, weight: Tensor, hidden: list[Tensor], needs: Needs) -> list[Tensor]:
    grads = Gradients(
        weight=weight.new_empty(weight.shape, dtype=call.acc_dtype) if needs.weight else None,
        bias=weight.new_empty(weight.shape[-2], dtype=call.acc_dtype) if needs.bias else None,
        hidden=[h.new_empty(h.shape, dtype=saved_grad_dtype(h)) for h in hidden] if needs.hidden else [],
    )
    return _or_empty(grads, call, weight)
