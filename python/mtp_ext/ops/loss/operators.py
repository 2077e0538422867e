"""The fused loss as operators of torch's library: what ``torch.compile`` sees as one node, and fake tensors can trace.

They take values and return gradients as values; the Functions of the public losses give them to autograd. Their shared
arguments are those of :class:`mtp_ext.ops.loss.accumulator.HeadLossAccumulator`. An output that was not asked for is
empty.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mtp_ext.ops.common import checks
from mtp_ext.ops.loss import native_cpu as fused_cpu
from mtp_ext.ops.loss.accumulator import HeadLossAccumulator
from mtp_ext.ops.loss.arguments import saved_grad_dtype
from mtp_ext.ops.loss.row_kernels import RowOptions

# hidden is the n heads' [B, S, D], or one tensor [n, B, S, D].
_TENSORS = (
    "Tensor[] hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor? document_ids, Tensor? token_weights, "
    "Tensor? class_weights"
)
_OPTIONS = (
    "SymInt seq_len, int n_heads, int first_shift, int ignore_index, float label_smoothing, float z_loss, "
    "float softcap, float logit_scale, int[] detach_weight, ScalarType compute_dtype, SymInt? chunk_rows, "
    "SymInt? workspace_bytes, SymInt[]? max_valid, str? group_name"
)
_REDUCTION = "float normalizer, bool with_metrics"
_NEEDS = "bool need_hidden, bool need_weight, bool need_bias"


def _accumulator(
    weight: Tensor,
    labels: Tensor,
    *,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    logit_scale: float,
    group_name: str | None,
    normalizer: float,
    normalizer_tensor: Tensor | None,
    **arguments: Any,
) -> HeadLossAccumulator:
    checks.check_backend(weight.device)
    group = None
    if group_name is not None:
        group = torch.distributed.distributed_c10d._resolve_process_group(group_name)  # type: ignore[attr-defined,arg-type]
    per_head = normalizer == 0.0 and normalizer_tensor is None
    return HeadLossAccumulator(
        labels,
        weight,
        options=RowOptions(label_smoothing, z_loss, softcap, logit_scale),
        normalizer="per_head" if per_head else normalizer if normalizer_tensor is None else normalizer_tensor,
        group=group,
        **arguments,
    )


def _fused(tensors: tuple[Any, ...], normalizer_tensor: Tensor | None, **options: Any) -> fused_cpu.FusedLoss:
    """The native call on the CPU, where reading a normalizer costs nothing."""
    del options["group_name"]
    number = options.pop("normalizer") or None if normalizer_tensor is None else float(normalizer_tensor)
    return fused_cpu.fused_loss(*tensors, **{**options, "normalizer": number})


def _statistics(fused: fused_cpu.FusedLoss, labels: Tensor, with_metrics: bool, first_shift: int) -> tuple[Tensor, ...]:
    """head_loss, n_valid, top1 and accept_length."""
    none = fused.loss.new_empty(0, dtype=torch.float32)
    measured = fused.metrics(labels, first_shift) if with_metrics else (none, none.clone())
    return (fused.head_loss, fused.n_valid, *measured)


def _or_empty(x: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if x is None else x


def _gradients(accumulator: HeadLossAccumulator, hidden: list[Tensor]) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Runs all heads: the gradients of weight, bias and hidden states, empty where they are not formed."""
    stacked = hidden[0].dim() == 4
    formed = accumulator.add_all(hidden[0] if stacked else hidden, grad_dtype=saved_grad_dtype(hidden[0]))
    grads = formed if isinstance(formed, list) else [formed]
    return (
        _or_empty(accumulator.grad_weight, accumulator.weight),
        _or_empty(accumulator.grad_bias, accumulator.weight),
        [g for g in grads if g is not None],
    )


def multi_token_loss(
    hidden: list[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    document_ids: Tensor | None,
    token_weights: Tensor | None,
    class_weights: Tensor | None,
    head_weights: Tensor | None,
    normalizer_tensor: Tensor | None,
    *,
    with_metrics: bool,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    **options: Any,
) -> tuple[Any, ...]:
    """Loss, metrics and gradients in one pass: 6 N D V FLOP, 2 without gradients."""
    tensors = (hidden, weight, bias, labels, document_ids, token_weights, class_weights)
    if fused_cpu.takes(weight, options["group_name"]):
        needs = {"need_hidden": need_hidden, "need_weight": need_weight, "need_bias": need_bias}
        fused = _fused(tensors, normalizer_tensor, head_weights=head_weights, **needs, **options)
        gradients = (_or_empty(fused.grad_weight, weight), _or_empty(fused.grad_bias, weight), fused.grad_hidden)
        return (fused.loss, *_statistics(fused, labels, with_metrics, options["first_shift"]), *gradients)
    with torch.autocast(weight.device.type, enabled=False):
        accumulator = _accumulator(
            weight,
            labels,
            bias=bias,
            document_ids=document_ids,
            token_weights=token_weights,
            class_weights=class_weights,
            head_weights=head_weights,
            normalizer_tensor=normalizer_tensor,
            need_grad_hidden=need_hidden,
            need_grad_weight=need_weight,
            need_grad_bias=need_bias,
            **options,
        )
        grads = _gradients(accumulator, hidden)
        return (*accumulator.result(with_metrics=with_metrics), *grads)


_multi_token_loss = torch.library.custom_op(
    "mtp_ext::_multi_token_loss",
    multi_token_loss,
    mutates_args=(),
    schema=f"({_TENSORS}, Tensor? head_weights, Tensor? normalizer_tensor, *, {_REDUCTION}, {_OPTIONS}, {_NEEDS}) "
    "-> (Tensor loss, Tensor head_loss, Tensor n_valid, Tensor top1, Tensor accept_length, Tensor grad_weight, "
    "Tensor grad_bias, Tensor[] grad_hidden)",
)


@_multi_token_loss.register_fake
def _(
    hidden: list[Tensor],
    weight: Tensor,
    *tensors: Tensor | None,
    with_metrics: bool,
    n_heads: int,
    compute_dtype: torch.dtype,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    **options: Any,
) -> tuple[Any, ...]:
    dtype = _result_dtype(compute_dtype)
    return (
        weight.new_empty((), dtype=dtype),
        *_fake_statistics(weight, n_heads, dtype, with_metrics),
        *_fake_gradients(hidden, weight, dtype, need_hidden, need_weight, need_bias),
    )


def row_losses(
    hidden: list[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    document_ids: Tensor | None,
    token_weights: Tensor | None,
    class_weights: Tensor | None,
    normalizer_tensor: Tensor | None,
    *,
    with_metrics: bool,
    **options: Any,
) -> tuple[Tensor, ...]:
    """Loss (with its token weight) and log-sum-exp of every row, ``[n, B, S]``, without gradients: 2 N D V FLOP."""
    tensors = (hidden, weight, bias, labels, document_ids, token_weights, class_weights)
    if fused_cpu.takes(weight, options["group_name"]):
        fused = _fused(tensors, normalizer_tensor, need_hidden=False, need_weight=False, need_bias=False, **options)
        statistics = _statistics(fused, labels, with_metrics, options["first_shift"])
        return (fused.losses, fused.lse, fused.denominators, *statistics)
    with torch.autocast(weight.device.type, enabled=False):
        accumulator = _accumulator(
            weight,
            labels,
            bias=bias,
            document_ids=document_ids,
            token_weights=token_weights,
            class_weights=class_weights,
            normalizer_tensor=normalizer_tensor,
            need_grad_hidden=False,
            need_grad_weight=False,
            **options,
        )
        _gradients(accumulator, hidden)
        shape = (accumulator.n_heads, accumulator.labels.shape[0], accumulator.seq_len)
        tables = (accumulator.row_losses().view(shape), accumulator.loop.tables.lse.view(shape))
        return (*tables, accumulator.denominator.clone(), *accumulator.result(with_metrics=with_metrics)[1:])


_row_losses = torch.library.custom_op(
    "mtp_ext::_row_losses",
    row_losses,
    mutates_args=(),
    schema=f"({_TENSORS}, Tensor? normalizer_tensor, *, {_REDUCTION}, {_OPTIONS}) -> (Tensor losses, Tensor lse, "
    "Tensor denominator, Tensor head_loss, Tensor n_valid, Tensor top1, Tensor accept_length)",
)


@_row_losses.register_fake
def _(
    hidden: list[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *tensors: Tensor | None,
    with_metrics: bool,
    seq_len: int,
    n_heads: int,
    compute_dtype: torch.dtype,
    **options: Any,
) -> tuple[Tensor, ...]:
    dtype = _result_dtype(compute_dtype)
    table = weight.new_empty((n_heads, labels.shape[0], seq_len), dtype=dtype)
    denominator = weight.new_empty(n_heads, dtype=dtype)
    return (table, torch.empty_like(table), denominator, *_fake_statistics(weight, n_heads, dtype, with_metrics))


def row_losses_backward(
    hidden: list[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    document_ids: Tensor | None,
    token_weights: Tensor | None,
    class_weights: Tensor | None,
    grad_losses: Tensor,
    grad_lse: Tensor,
    *,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    **options: Any,
) -> tuple[Any, ...]:
    """The gradients for any incoming ones ``[n, B, S]``; forms the logits again: 6 N D V FLOP."""
    tensors = (hidden, weight, bias, labels, document_ids, token_weights, class_weights)
    if fused_cpu.takes(weight, options["group_name"]):
        scales = {"row_scale": grad_losses.reshape(-1), "lse_grad": grad_lse.reshape(-1)}
        needs = {"need_hidden": need_hidden, "need_weight": need_weight, "need_bias": need_bias}
        fused = _fused(tensors, None, normalizer=1.0, **scales, **needs, **options)
        return _or_empty(fused.grad_weight, weight), _or_empty(fused.grad_bias, weight), fused.grad_hidden
    with torch.autocast(weight.device.type, enabled=False):
        accumulator = _accumulator(
            weight,
            labels,
            bias=bias,
            document_ids=document_ids,
            token_weights=token_weights,
            class_weights=class_weights,
            row_scale=grad_losses.reshape(-1),
            lse_grad=grad_lse.reshape(-1),
            normalizer=1.0,
            normalizer_tensor=None,
            need_grad_hidden=need_hidden,
            need_grad_weight=need_weight,
            need_grad_bias=need_bias,
            **options,
        )
        return _gradients(accumulator, hidden)


_row_losses_backward = torch.library.custom_op(
    "mtp_ext::_row_losses_backward",
    row_losses_backward,
    mutates_args=(),
    schema=f"({_TENSORS}, Tensor grad_losses, Tensor grad_lse, *, {_OPTIONS}, {_NEEDS}) -> (Tensor grad_weight, "
    "Tensor grad_bias, Tensor[] grad_hidden)",
)


@_row_losses_backward.register_fake
def _(
    hidden: list[Tensor],
    weight: Tensor,
    *tensors: Tensor | None,
    compute_dtype: torch.dtype,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    **options: Any,
) -> tuple[Any, ...]:
    return _fake_gradients(hidden, weight, _result_dtype(compute_dtype), need_hidden, need_weight, need_bias)


@torch.library.custom_op(
    "mtp_ext::_add_scaled_", mutates_args=("buffer",), schema="(Tensor(a!) buffer, Tensor grad, Tensor by) -> ()"
)
def _add_scaled_(buffer: Tensor, grad: Tensor, by: Tensor) -> None:
    """``buffer += grad * by``, ``by`` 0-d."""
    buffer.addcmul_(grad, by.to(grad.dtype))


@_add_scaled_.register_fake
def _(buffer: Tensor, grad: Tensor, by: Tensor) -> None:
    return None


class operators:
    """The operators by the names of their bodies."""

    multi_token_loss = torch.ops.mtp_ext._multi_token_loss
    row_losses = torch.ops.mtp_ext._row_losses
    row_losses_backward = torch.ops.mtp_ext._row_losses_backward


def _result_dtype(compute_dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if compute_dtype == torch.float64 else torch.float32


def _fake_statistics(weight: Tensor, n_heads: int, dtype: torch.dtype, with_metrics: bool) -> tuple[Tensor, ...]:
    """head_loss, n_valid, top1 and accept_length."""
    return (
        weight.new_empty(n_heads, dtype=dtype),
        weight.new_empty(n_heads, dtype=torch.int64),
        weight.new_empty(n_heads if with_metrics else 0, dtype=torch.float32),
        weight.new_empty(() if with_metrics else 0, dtype=torch.float32),
    )


def _fake_gradients(
    hidden: Sequence[Tensor], weight: Tensor, dtype: torch.dtype, need_hidden: bool, need_weight: bool, need_bias: bool
) -> tuple[Tensor, Tensor, list[Tensor]]:
    return (
        weight.new_empty(weight.shape, dtype=dtype) if need_weight else weight.new_empty(0),
        weight.new_empty(weight.shape[-2], dtype=dtype) if need_bias else weight.new_empty(0),
        [h.new_empty(h.shape, dtype=saved_grad_dtype(h)) for h in hidden] if need_hidden else [],
    )
