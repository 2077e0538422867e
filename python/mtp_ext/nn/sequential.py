"""The paper's order: each head's forward, loss and backward within the forward; ``loss.backward()`` runs the trunk.

Independent heads run one after the other, and of each only the gradient at the trunk's output and at its parameters
is left. Chained heads run forward along the chain, which keeps a layer's activations a head (or with ``recompute`` its
input alone), then backward from the end that is furthest from the trunk (Gloeckle et al. 2024, figure S11): one
vector-Jacobian product a head, with the sum of the cotangents of its own loss and of the head after it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mtp_ext.nn.random_state import RandomState
from mtp_ext.nn.stack import HeadStack, chains_to_run, scaled
from mtp_ext.nn.step_loss import step_loss
from mtp_ext.nn.targets import Targets
from mtp_ext.ops.result import MultiTokenLoss


def sequential_loss(heads: HeadStack, hidden: Tensor, weight: Tensor, context: Any, targets: Targets) -> MultiTokenLoss:
    """Loss and metrics of all heads, gradients ready; arguments as of ``multi_token_loss``."""
    chains = chains_to_run(heads, targets.active)
    if all(chain[0] in targets.detach_heads for chain in chains):
        hidden = hidden.detach()  # an input without a gradient would send zeros through the trunk
    # A parameter that several heads read is one input, and gets one gradient.
    parameters = list({id(p): p for chain in chains for k in chain for p in heads.parameters_of(k)}.values())
    inputs = (hidden, weight, targets.head_weights, *parameters)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
        return MultiTokenLoss(*SequentialFunction.apply(heads, context, targets, *inputs))  # type: ignore[no-untyped-call]
    return _Sweep(heads, context, targets, hidden, weight, GradientSums([]), need_grad_weight=False).run()


class SequentialFunction(torch.autograd.Function):
    """Takes the heads' gradients in its forward and hands them to autograd in its backward.

    Inputs are the trunk's output, the unembedding, the head weights and every parameter of the heads, so each of them
    gets its whole gradient once, from its own autograd node: hooks, DDP, clipping and loss scaling see nothing unusual.
    """

    @staticmethod
    def forward(
        ctx: Any,
        heads: HeadStack,
        context: Any,
        targets: Targets,
        hidden: Tensor,
        weight: Tensor,
        head_weights: Tensor | None,
        *parameters: Tensor,
    ) -> tuple[Tensor, ...]:
        sums = GradientSums(x for x in (hidden, *parameters) if x.requires_grad)
        sweep = _Sweep(heads, context, targets, hidden, weight, sums, need_grad_weight=weight.requires_grad)
        result = sweep.run()
        grad_weight = sweep.loss.grad_weight
        wants_head_weights = head_weights is not None and head_weights.requires_grad
        ctx.head_weights_dtype = None if head_weights is None else head_weights.dtype
        ctx.save_for_backward(
            sums.of(hidden),
            None if grad_weight is None else grad_weight.to(weight.dtype),
            result.head_loss if wants_head_weights else None,
            *(sums.of(p) for p in parameters),
        )
        ctx.mark_non_differentiable(*result[1:])
        return tuple(result)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, head_weights, *parameters = scaled(ctx.saved_tensors, grad_loss)
        if head_weights is not None:
            head_weights = head_weights.to(ctx.head_weights_dtype)
        return (None, None, None, hidden, weight, head_weights, *parameters)


class GradientSums:
    """Gradients that are being summed, by the identity of the tensor that they belong to.

    Their memory is taken before the first head runs: long-lived gradients in between the activations of successive
    heads would keep the allocator from using that space again (on glibc, 2 MB a head at ``T = 1536, D = 64``).
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._buffers = {id(x): torch.empty_like(x) for x in tensors}
        self._empty = set(self._buffers)

    def __bool__(self) -> bool:
        return bool(self._buffers)

    def wants(self, x: Tensor) -> bool:
        """Whether ``x`` gets a gradient."""
        return id(x) in self._buffers

    def add(self, x: Tensor, grad: Tensor) -> None:
        """Adds ``grad`` to the gradient of ``x``."""
        if id(x) in self._empty:
            self._buffers[id(x)].copy_(grad)
            self._empty.remove(id(x))
        else:
            self._buffers[id(x)].add_(grad)

    def of(self, x: Tensor) -> Tensor | None:
        """The gradient of ``x``; None if it is not wanted, or nothing was added."""
        return None if id(x) in self._empty else self._buffers.get(id(x))


class _Recorded(NamedTuple):
    """A head's forward, cut off from everything outside it."""

    k: int
    x: Tensor  # its input, a leaf that requires grad if a gradient is wanted there or before
    parameters: list[Tensor]
    stand_ins: list[Tensor]  # the parameters, detached: their hooks see only the whole gradient, later
    state: Tensor
    normed: Tensor


class _Kept(NamedTuple):
    """What a head needs to run again: its input, and the random numbers of its dropout."""

    k: int
    x: Tensor
    random: RandomState | None


class _Sweep:
    """One pass over all heads: losses, metrics, and those gradients that ``sums`` wants."""

    def __init__(
        self,
        heads: HeadStack,
        context: Any,
        targets: Targets,
        hidden: Tensor,
        weight: Tensor,
        sums: GradientSums,
        *,
        need_grad_weight: bool,
    ) -> None:
        self.heads, self.context, self.targets, self.hidden, self.sums = heads, context, targets, hidden, sums
        self.loss = step_loss(
            heads, hidden, weight, targets, need_grad_hidden=bool(sums), need_grad_weight=need_grad_weight
        )

    def run(self) -> MultiTokenLoss:
        """Forward along each chain of heads, and back from its end."""
        for chain in chains_to_run(self.heads, self.loss.heads):
            if not self.sums:
                self._measure(chain)
                continue
            kept = self._forward(chain)
            grad: Tensor | None = None
            while kept:
                head = kept.pop()
                grad = self._backward(head if isinstance(head, _Recorded) else self._run_again(head), grad)
                del head
            if grad is not None and self.sums.wants(self.hidden):
                self.sums.add(self.hidden, grad)
        return self.loss.result()

    def _measure(self, chain: tuple[int, ...]) -> None:
        """The chain's losses where no gradient is wanted in a head: nothing has to wait for a way back."""
        x = self.hidden.detach()
        for k in chain:
            head = self._record(k, x)
            self._backward(head, None)
            x = head.state

    def _forward(self, chain: tuple[int, ...]) -> list[_Recorded | _Kept]:
        """The chain's heads in order; what their backwards need."""
        kept: list[_Recorded | _Kept] = []
        x, wanted = self.hidden.detach(), self.sums.wants(self.hidden)
        for i, k in enumerate(chain):
            wanted = wanted and k not in self.targets.detach_heads
            x = x.detach().requires_grad_(wanted)
            wanted = wanted or any(self.sums.wants(p) for p in self.heads.parameters_of(k))
            if self.heads.recompute and i + 1 < len(chain):
                kept.append(_Kept(k, x, RandomState.of(x.device) if self.heads.training else None))
                with torch.no_grad():
                    x = self.heads.run_with(k, [p.detach() for p in self.heads.parameters_of(k)], x, self.context)[0]
            else:
                recorded = self._record(k, x)
                kept.append(recorded)
                x = recorded.state
        return kept

    def _run_again(self, head: _Kept) -> _Recorded:
        if head.random is None:
            return self._record(head.k, head.x)
        with head.random.restored():
            return self._record(head.k, head.x)

    def _record(self, k: int, x: Tensor) -> _Recorded:
        """Head ``k``'s forward on its input ``x``, a leaf."""
        parameters = self.heads.parameters_of(k)
        stand_ins = [p.detach().requires_grad_(self.sums.wants(p)) for p in parameters]
        with torch.set_grad_enabled(bool(self.sums)):
            state, normed = self.heads.run_with(k, stand_ins, x, self.context)
        return _Recorded(k, x, parameters, stand_ins, state, normed)

    def _backward(self, head: _Recorded, grad_state: Tensor | None) -> Tensor | None:
        """The head's loss and its one vector-Jacobian product.

        Args:
            head: The head's forward.
            grad_state: The gradient of the later heads' losses in its layer output.
        Returns:
            The gradient in its input, ``[B, S, D]``, if that is wanted.
        """
        outputs, cotangents = [], []
        if head.k in self.loss.heads:
            grad_normed = self.loss.add({head.k: head.normed.detach()})[head.k]
            if grad_normed is not None and head.normed.requires_grad:
                outputs.append(head.normed)
                cotangents.append(grad_normed)
        if grad_state is not None and head.state.requires_grad:
            outputs.append(head.state)
            cotangents.append(grad_state)
        pairs = [(p, s) for p, s in zip(head.parameters, head.stand_ins, strict=True) if s.requires_grad]
        inputs = [*([head.x] if head.x.requires_grad else []), *(s for _, s in pairs)]
        if not inputs or not outputs:
            return None
        # As a backward that the user calls outside autocast: what was computed in 16 bit goes back in 16 bit.
        with torch.autocast(head.x.device.type, enabled=False):
            grads = list(torch.autograd.grad(outputs, inputs, cotangents, allow_unused=True))
        grad_x = grads.pop(0) if head.x.requires_grad else None
        for (parameter, _), grad in zip(pairs, grads, strict=True):
            if grad is not None:
                self.sums.add(parameter, grad)
        return grad_x
