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

Grads = tuple[Tensor | None, ...]


@functools.cache
def _error(n_inputs: int) -> Any:
    return torch._C._functions.DelayedError(NO_SECOND_DERIVATIVE.encode(), n_inputs)


def link(like: Tensor) -> Tensor:
    """Makes a last output of a Function, without elements, which the forward saves last as well.

    Autograd gives a saved output its graph back. So :func:`differentiable_once` finds that of the inputs, without their
    memory, and without a version that the caller's in-place operations on the other outputs would change.
    """
    return like.new_empty(0)


def differentiable_once(backward: Callable[..., Grads]) -> Callable[..., Grads]:
    """Makes the gradients of a backward function raise RuntimeError when they are differentiated.

    The Function's last output and last saved tensor is a :func:`link`, whose gradient the backward does not get.
    :func:`torch.autograd.function.once_differentiable` does so only if the incoming gradient requires grad. Otherwise
    it returns constants, and ``create_graph=True`` loses the second derivative without an error.
    """

    @functools.wraps(backward)
    def wrapper(ctx: Any, *incoming: Tensor) -> Grads:
        if not torch.is_grad_enabled():  # without create_graph
            return backward(ctx, *incoming[:-1])
        with torch.no_grad():
            grads = backward(ctx, *incoming[:-1])
        sources = [x for x in (ctx.saved_tensors[-1], *incoming[:-1]) if x is not None and x.requires_grad]
        return tuple(None if x is None else _raising(x, sources) for x in grads)

    return wrapper


def _raising(grad: Tensor, sources: Sequence[Tensor]) -> Tensor:
    """``grad`` as a function of ``sources`` whose derivative raises."""
    outputs = _error(1 + len(sources))(grad.detach().requires_grad_(), *sources)
    return outputs if isinstance(outputs, Tensor) else outputs[0]


def is_last_backward() -> bool:
    """Returns True within a backward that frees its graph, so that saved tensors may be handed out uncopied."""
    return torch.compiler.is_compiling() or not torch._C._autograd._get_current_graph_task_keep_graph()
