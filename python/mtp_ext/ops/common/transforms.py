"""Operators whose calls torch records or transforms: torch.compile, torch.export, make_fx, fake tensors, torch.func."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef
from torch.autograd import forward_ad
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

_PLAIN_TYPES = (Tensor, torch.nn.Parameter)


def is_transformed() -> bool:
    """Returns True within a transform of :mod:`torch.func`, and within forward-mode differentiation."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def is_written_down() -> bool:
    """Returns True while ``make_fx``, ``torch.export`` or ``torch.jit.trace`` writes a graph to differentiate later."""
    if torch.compiler.is_compiling():
        return torch.compiler.is_exporting()
    proxies = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY)
    return proxies is not None or torch._C._get_tracing_state() is not None


def is_recorded(*tensors: Tensor) -> bool:
    """Returns True if a loss of these tensors must be an operator; raises RuntimeError where none can be recorded."""
    if torch.compiler.is_compiling() or any(type(x) not in _PLAIN_TYPES for x in tensors):
        return True
    if torch._C._get_tracing_state() is not None:
        raise RuntimeError("torch.jit.trace cannot record a loss of mtp_ext: use torch.export or torch.compile")
    return is_transformed() or is_written_down()


class Operator:
    """A custom operator with an autograd formula that the transforms of :mod:`torch.func` use as well.

    torch's ``register_autograd`` alone supports none of them (torch 2.13).

    Args:
        operator: The operator, of tensors, lists of tensors and constants.
        setup_context: ``(ctx, inputs, output)``, as in :class:`torch.autograd.Function`.
        backward: ``(ctx, *grads)``; returns gradients in the structure of ``ctx.needs_input_grad``.
    """

    def __init__(
        self, operator: CustomOpDef, setup_context: Callable[..., None], backward: Callable[..., tuple[Any, ...]]
    ) -> None:
        self.operator, self.setup_context, self.backward = operator, setup_context, backward
        operator.register_autograd(backward, setup_context=setup_context)

    def __call__(self, *arguments: Any) -> Any:
        """Calls the operator."""
        if not is_transformed():
            return self.operator(*arguments)
        leaves, structure = tree_flatten(arguments)
        call = _Call(self, structure)
        outputs = _Transformed.apply(call, *leaves)  # type: ignore[no-untyped-call]
        return tree_unflatten(outputs, call.of_outputs)


class _Call:
    """An operator and the structure of its arguments and outputs."""

    of_outputs: TreeSpec

    def __init__(self, operator: Operator, of_arguments: TreeSpec) -> None:
        self.operator, self.of_arguments = operator, of_arguments


class _Transformed(torch.autograd.Function):
    """A call of an operator as torch.func takes it: all tensors are arguments of their own.

    Under ``vmap`` the operator runs once for each sample.
    """

    @staticmethod
    def forward(call: _Call, *leaves: Any) -> tuple[Tensor, ...]:
        outputs = call.operator.operator(*tree_unflatten(leaves, call.of_arguments))
        flat, call.of_outputs = tree_flatten(outputs)
        return tuple(flat)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        call, *leaves = inputs
        ctx.call = call
        arguments = tree_unflatten(leaves, call.of_arguments)
        call.operator.setup_context(ctx, arguments, tree_unflatten(output, call.of_outputs))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        call = ctx.call
        # In the structure of the arguments, as torch gives it to the formulas of operators.
        ctx.needs_input_grad = tree_unflatten(ctx.needs_input_grad[1:], call.of_arguments)
        found = call.operator.backward(ctx, *tree_unflatten(grads, call.of_outputs))
        return None, *tree_flatten(found)[0]

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> None:
        raise RuntimeError(
            "the losses of mtp_ext have no forward-mode derivative (jvp, jacfwd, hessian, dual tensors): use "
            "torch.func.grad, vjp or jacrev, or differentiate mtp_ext.ops.reference, or a model with "
            "schedule='autograd'"
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], call: _Call, *leaves: Any) -> tuple[Any, ...]:
        samples = []
        for i in range(info.batch_size):
            of_sample = [x if d is None else x.select(d, i) for x, d in zip(leaves, in_dims[1:], strict=True)]
            samples.append(_Transformed.apply(call, *of_sample))  # type: ignore[no-untyped-call]
        return tuple(torch.stack(outputs) for outputs in zip(*samples, strict=True)), 0
