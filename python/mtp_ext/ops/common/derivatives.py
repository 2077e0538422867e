"""Backward functions without a derivative of their own: a second derivative raises instead of being zero."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

NO_SECOND_DERIVATIVE = (
    "the losses of mtp_ext have no second derivative: kernels compute their gradients. Differentiate twice through "
    "mtp_ext.ops.reference, or through a model with schedule='autograd'"
)
_PLAIN_TYPES = (Tensor, torch.nn.Parameter)

Grads = tuple[Tensor | None, ...]


def remember_inputs(ctx: Any, inputs: Sequence[Tensor | None]) -> None:
    """Keeps the graph of a Function's inputs, without their memory, for :func:`differentiable_once`.

    Takes 3 us. To be called in the forward of the Function, where autograd is off.
    """
    ctx.inputs = None
    needing = [x for x in inputs if x is not None and x.requires_grad]
    if not needing or torch.compiler.is_compiling() or any(type(x) not in _PLAIN_TYPES for x in needing):
        return
    torch._C._set_grad_enabled(True)
    try:
        outputs = _error(len(needing))(*needing)
    finally:
        torch._C._set_grad_enabled(False)
    ctx.inputs = outputs if isinstance(outputs, Tensor) else outputs[0]
    ctx.inputs.data = _nothing(ctx.inputs.dtype, ctx.inputs.device)


@functools.cache
def _error(n_inputs: int) -> Any:
    return torch._C._functions.DelayedError(NO_SECOND_DERIVATIVE.encode(), n_inputs)


@functools.cache
def _nothing(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(0, dtype=dtype, device=device)


def differentiable_once(backward: Callable[..., Grads]) -> Callable[..., Grads]:
    """Makes the gradients of a backward function raise RuntimeError when they are differentiated.

    :func:`torch.autograd.function.once_differentiable` does so only if the incoming gradient requires grad. Otherwise
    it returns constants, and ``create_graph=True`` loses the second derivative without an error.
    """

    @functools.wraps(backward)
    def wrapper(ctx: Any, *incoming: Tensor) -> Grads:
        if not torch.is_grad_enabled():  # without create_graph
            return backward(ctx, *incoming)
        with torch.no_grad():
            grads = backward(ctx, *incoming)
        sources = [x for x in (ctx.inputs, *incoming) if x is not None and x.requires_grad]
        return tuple(None if x is None else _raising(x, sources) for x in grads)

    return wrapper


def _raising(grad: Tensor, sources: Sequence[Tensor]) -> Tensor:
    """``grad`` as a function of ``sources`` whose derivative raises."""
    outputs = _error(1 + len(sources))(grad.detach().requires_grad_(), *sources)
    return outputs if isinstance(outputs, Tensor) else outputs[0]


def is_last_backward() -> bool:
    """Returns True within a backward that frees its graph, so that saved tensors may be handed out uncopied."""
    return torch.compiler.is_compiling() or not torch._C._autograd._get_current_graph_task_keep_graph()
