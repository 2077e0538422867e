"""The paper's order: each head's forward, loss and backward within the forward; ``loss.backward()`` runs the trunk.

Independent heads run one by one, and each leaves only the gradients of the trunk's output and of its parameters.
Chained heads run forward along the chain, keeping a layer's activations per head (with ``recompute``, only its input),
then backward from the end of the chain (Gloeckle et al. 2024, figure S11): one vector-Jacobian product per head, with
the sum of the cotangents of its own loss and of the next head.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mtp_ext.nn.schedules.fsdp import HeadWeights, reduce_in_backward
from mtp_ext.nn.schedules.head_stack import HeadStack, chains_to_run
from mtp_ext.nn.schedules.outside import check_nothing_learns, new_stand_in, next_sequence_number, outside_leaves
from mtp_ext.nn.schedules.random_state import RandomState
from mtp_ext.nn.schedules.step_loss import step_loss
from mtp_ext.nn.schedules.targets import Targets
from mtp_ext.ops.common.result import MultiTokenLoss
from mtp_ext.ops.common.runtime import outside_graphs, without_autocast
from mtp_ext.ops.loss.arguments import Gradients
from mtp_ext.ops.loss.autograd import with_gradients


@outside_graphs
def sequential_loss(heads: HeadStack, hidden: Tensor, weight: Tensor, context: Any, targets: Targets) -> MultiTokenLoss:
    """Computes loss, metrics and gradients of all heads; arguments as in ``multi_token_loss``."""
    chains = chains_to_run(heads, targets.active)
    if all(chain[0] in targets.detach_heads for chain in chains):
        hidden = hidden.detach()  # otherwise zeros would be propagated through the trunk
    weights = HeadWeights(heads, [k for chain in chains for k in chain])
    with_grad = torch.is_grad_enabled()
    sums: GradientSums | None = None
    if with_grad and (hidden.requires_grad or weights.learn):
        sums = GradientSums()
        sums.expect([hidden, *weights.known()])
    with torch.no_grad():
        sweep = _Sweep(heads, weights, context, targets, hidden, weight, sums, with_grad=with_grad)
        sweep.run()
    # A parameter that several heads share is one input with one gradient.
    parameters = [] if sums is None else [x for x in sums.tensors if x is not hidden]
    inputs = (hidden, weight, targets.call.bias, targets.call.head_weights, *parameters)
    if not with_grad or not any(x is not None and x.requires_grad for x in inputs):
        return sweep.loss.result()
    grad_weight = sweep.loss.grad_weight
    gradients = Gradients(
        weight=None if grad_weight is None else grad_weight.to(weight.dtype),
        bias=sweep.loss.grad_bias,
        hidden=[sweep.sums.of(x) for x in (hidden, *parameters)],
    )
    result = with_gradients(sweep.loss.result(), gradients, targets.call, weight, [hidden, *parameters])
    reduce_in_backward(result.loss, weights.modules, gather=False)
    return result


class GradientSums:
    """Running sums of gradients, keyed by the identity of their tensor.

    Their memory is allocated before the first head runs if possible: long-lived gradients between the activations of
    successive heads would fragment the heap (on glibc, 2 MB per head at ``T = 1536, D = 64``).
    """

    def __init__(self) -> None:
        self._buffers: dict[int, Tensor] = {}
        self._empty: set[int] = set()
        self.tensors: list[Tensor] = []
        """The tensors that get a gradient."""

    def expect(self, tensors: Iterable[Tensor]) -> None:
        """Allocates the gradients of those ``tensors`` that require one, once each."""
        for x in tensors:
            if x.requires_grad and id(x) not in self._buffers:
                self._buffers[id(x)] = torch.empty_like(x)
                self._empty.add(id(x))
                self.tensors.append(x)

    def wants(self, x: Tensor) -> bool:
        """Returns True if ``x`` gets a gradient."""
        return id(x) in self._buffers

    def add(self, x: Tensor, grad: Tensor) -> None:
        """Adds ``grad`` to the gradient of ``x``."""
        if id(x) in self._empty:
            self._buffers[id(x)].copy_(grad)
            self._empty.remove(id(x))
        else:
            self._buffers[id(x)].add_(grad)

    def of(self, x: Tensor) -> Tensor | None:
        """Returns the gradient of ``x``; None if it is not wanted or nothing was added."""
        return None if id(x) in self._empty else self._buffers.get(id(x))


class _Recorded(NamedTuple):
    """A head's forward, detached from the rest of the graph."""

    k: int
    x: Tensor  # its input, a leaf that requires grad if a gradient is wanted there or before
    parameters: list[Tensor]
    stand_ins: list[Tensor]  # the parameters, detached, so that their hooks only see the whole gradient later
    state: Tensor
    normed: Tensor
    since: int  # the first sequence number of its graph


class _Kept(NamedTuple):
    """The state for rerunning a head: its input and the random state of its dropout."""

    k: int
    x: Tensor
    random: RandomState | None


class _Sweep:
    """One pass over all heads: losses, metrics and the gradients in ``sums``, which is None if no head needs any."""

    def __init__(
        self,
        heads: HeadStack,
        weights: HeadWeights,
        context: Any,
        targets: Targets,
        hidden: Tensor,
        weight: Tensor,
        sums: GradientSums | None,
        *,
        with_grad: bool,
    ) -> None:
        self.heads, self.weights, self.context, self.targets, self.hidden = heads, weights, context, targets, hidden
        self.with_grad = with_grad
        self.learns, self.sums = sums is not None, GradientSums() if sums is None else sums
        self.loss = step_loss(heads, hidden, weight, targets, with_grad=with_grad, need_grad_hidden=self.learns)

    def run(self) -> None:
        """Runs each chain of heads forward, then backward from its end."""
        try:
            for chain in chains_to_run(self.heads, self.loss.heads):
                if self.learns:
                    self._learn(chain)
                else:
                    self._measure(chain)
        finally:
            self.weights.release_all()  # if a head raised an error

    def _learn(self, chain: tuple[int, ...]) -> None:
        """Computes the chain's losses and gradients."""
        kept = self._forward(chain)
        grad: Tensor | None = None
        while kept:
            head = kept.pop()
            self.weights.gather(head.k)
            grad = self._backward(head if isinstance(head, _Recorded) else self._run_again(head), grad)
            self.weights.release(head.k)
            del head
        if grad is not None and self.sums.wants(self.hidden):
            self.sums.add(self.hidden, grad)

    def _measure(self, chain: tuple[int, ...]) -> None:
        """Computes the chain's losses without gradients, head by head."""
        x = self.hidden.detach()
        for k in chain:
            head = self._record(k, x)
            check_nothing_learns(k, head.normed)
            self._backward(head, None)
            self.weights.release(k)
            x = head.state

    def _forward(self, chain: tuple[int, ...]) -> list[_Recorded | _Kept]:
        """Runs the chain forward and returns what backward needs; the last head's parameters stay gathered."""
        kept: list[_Recorded | _Kept] = []
        x, wanted = self.hidden.detach(), self.sums.wants(self.hidden)
        for i, k in enumerate(chain):
            wanted = wanted and k not in self.targets.detach_heads
            x = x.detach().requires_grad_(wanted)
            parameters, is_last = self._parameters(k), i + 1 == len(chain)
            wanted = wanted or any(self.sums.wants(p) for p in parameters)
            if self.heads.recompute and not is_last:
                kept.append(_Kept(k, x, RandomState.of(x.device) if self.heads.training else None))
                with torch.no_grad():
                    x = self.weights.run(k, [p.detach() for p in parameters], x, self.context)[0]
            else:
                recorded = self._record(k, x)
                kept.append(recorded)
                x = recorded.state
            if not is_last:
                self.weights.release(k)
        return kept

    def _parameters(self, k: int) -> list[Tensor]:
        """Gathers head ``k``'s parameters until they are released."""
        parameters = self.weights.gather(k)
        if self.learns:
            self.sums.expect(parameters)
        return parameters

    def _run_again(self, head: _Kept) -> _Recorded:
        if head.random is None:
            return self._record(head.k, head.x)
        with head.random.restored():
            return self._record(head.k, head.x)

    def _record(self, k: int, x: Tensor) -> _Recorded:
        """Runs head ``k`` on its input ``x``, a leaf."""
        parameters = self._parameters(k)
        stand_ins = [new_stand_in(p, requires_grad=self.sums.wants(p)) for p in parameters]
        since = next_sequence_number()
        with torch.set_grad_enabled(self.with_grad):
            state, normed = self.weights.run(k, stand_ins, x, self.context)
        return _Recorded(k, x, parameters, stand_ins, state, normed, since)

    def _backward(self, head: _Recorded, grad_state: Tensor | None) -> Tensor | None:
        """Computes the head's loss and its one vector-Jacobian product.

        Args:
            head: The head's forward.
            grad_state: The gradient of the later heads' losses with respect to its layer output.
        Returns:
            The gradient with respect to its input, ``[B, S, D]``, if wanted.
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
        outside = outside_leaves(head.k, outputs, (head.x, *head.stand_ins), head.since)
        self.sums.expect(outside)
        pairs = [(p, s) for p, s in zip(head.parameters, head.stand_ins, strict=True) if s.requires_grad]
        pairs += [(p, p) for p in outside]
        inputs = [*([head.x] if head.x.requires_grad else []), *(s for _, s in pairs)]
        if not inputs or not outputs:
            return None
        # Like a backward outside autocast: operations that ran in 16 bits have 16-bit gradients.
        with without_autocast(head.x.device):
            grads = list(torch.autograd.grad(outputs, inputs, cotangents, allow_unused=True))
        grad_x = grads.pop(0) if head.x.requires_grad else None
        for (parameter, _), grad in zip(pairs, grads, strict=True):
            if grad is not None:
                self.sums.add(parameter, grad)
        return grad_x
