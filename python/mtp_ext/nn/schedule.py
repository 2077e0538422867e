"""The three orders in which the heads' forwards, losses and backwards run; one loss, one set of gradients.

- ``sequential`` (Gloeckle et al. 2024, section 2 and figure S11): a head's forward, loss and backward before the next
  head's, all within the forward. Activations and logits of one head are held at a time, and ``loss.backward()`` runs
  the trunk alone. Chained heads: forward along the chain, then backward from its end, one vector-Jacobian product a
  head with the sum of the cotangents of its own loss and of the head after it.
- ``joint``: all heads forward under autograd, then one fused loss over ``n * B * S`` rows.
- ``autograd``: all heads forward, full logits, plain torch. The reference.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mtp_ext.nn.attention import AttentionContext
from mtp_ext.nn.targets import Targets
from mtp_ext.ops import multi_token_cross_entropy, reference
from mtp_ext.ops.autocast import autocast_dtype
from mtp_ext.ops.head_loss import HeadLossAccumulator
from mtp_ext.ops.result import MultiTokenLoss


class HeadStack(Protocol):
    """What a schedule needs of the heads; see :class:`mtp_ext.nn.heads.MTPHeads`."""

    n_heads: int
    chains: tuple[tuple[int, ...], ...]

    def run(self, k: int, x: Tensor, context: AttentionContext) -> tuple[Tensor, Tensor]: ...

    def run_with(
        self, k: int, parameters: Sequence[Tensor], x: Tensor, context: AttentionContext
    ) -> tuple[Tensor, Tensor]: ...

    def parameters_of(self, k: int) -> list[Tensor]: ...


def head_outputs(heads: HeadStack, hidden: Tensor, context: AttentionContext) -> list[Tensor]:
    """The normed outputs of heads ``1..n``, each ``[B, S, D]``, recorded by autograd."""
    outputs: dict[int, Tensor] = {}
    for chain in heads.chains:
        x = hidden
        for k in chain:
            x, outputs[k] = heads.run(k, x, context)
    return [outputs[k] for k in range(1, heads.n_heads + 1)]


def multi_token_loss(
    heads: HeadStack, hidden: Tensor, weight: Tensor, context: AttentionContext, targets: Targets, schedule: str
) -> MultiTokenLoss:
    """Loss and metrics of all heads by ``schedule``.

    Args:
        heads: The heads.
        hidden: ``[B, S, D]``, the trunk's output.
        weight: ``[V, D]``, the unembedding.
        context: Positions and visibility of this forward.
        targets: Labels and how they count.
        schedule: ``"sequential"``, ``"joint"`` or ``"autograd"``.
    """
    if schedule == "sequential":
        return _sequential(heads, hidden, weight, context, targets)
    check_schedule(schedule)
    outputs = head_outputs(heads, hidden, context)
    if schedule == "joint":
        return multi_token_cross_entropy(
            outputs, weight, targets.labels, **targets.of_the_loss(), **targets.of_the_chunks()
        )
    return reference.multi_token_cross_entropy(outputs, weight, targets.labels, **targets.of_the_loss())


def check_schedule(schedule: str) -> None:
    """Raises ValueError for an unknown name."""
    if schedule not in ("sequential", "joint", "autograd"):
        raise ValueError(f"schedule must be 'sequential', 'joint' or 'autograd', got {schedule!r}")


def _sequential(
    heads: HeadStack, hidden: Tensor, weight: Tensor, context: AttentionContext, targets: Targets
) -> MultiTokenLoss:
    # A parameter that several heads read is one input, and gets one gradient.
    parameters = list({id(p): p for k in range(1, heads.n_heads + 1) for p in heads.parameters_of(k)}.values())
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
        context: AttentionContext,
        targets: Targets,
        hidden: Tensor,
        weight: Tensor,
        head_weights: Tensor | None,
        *parameters: Tensor,
    ) -> tuple[Tensor, ...]:
        sums = GradientSums(x for x in (hidden, *parameters) if x.requires_grad)
        sweep = _Sweep(heads, context, targets, hidden, weight, sums, need_grad_weight=weight.requires_grad)
        result = sweep.run()
        grad_weight = sweep.accumulator.grad_weight
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
        # Saved gradients are handed out as they are or as scaled copies, never scaled in place: backward may run again.
        saved: tuple[Tensor | None, ...] = ctx.saved_tensors
        if grad_loss.device.type != "cpu" or grad_loss.item() != 1.0:
            saved = tuple(None if g is None else g * grad_loss.to(g.dtype) for g in saved)
        hidden, weight, head_weights, *parameters = saved
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
        """The gradient of ``x``; None if it is not wanted."""
        return self._buffers.get(id(x))


class _Recorded(NamedTuple):
    """A head's forward, cut off from everything outside it."""

    k: int
    x: Tensor  # its input, a leaf that requires grad if a gradient is wanted there or before
    parameters: list[Tensor]
    stand_ins: list[Tensor]  # the parameters, detached: their hooks see only the whole gradient, later
    state: Tensor
    normed: Tensor


class _Sweep:
    """One pass over all heads: losses, metrics, and those gradients that ``sums`` wants."""

    def __init__(
        self,
        heads: HeadStack,
        context: AttentionContext,
        targets: Targets,
        hidden: Tensor,
        weight: Tensor,
        sums: GradientSums,
        *,
        need_grad_weight: bool,
    ) -> None:
        self.heads, self.context, self.hidden, self.sums = heads, context, hidden, sums
        self.accumulator = HeadLossAccumulator(
            targets.labels,
            weight.detach(),
            seq_len=hidden.shape[1],
            n_heads=heads.n_heads,
            need_grad_hidden=bool(sums),
            need_grad_weight=need_grad_weight,
            compute_dtype=autocast_dtype(hidden) or hidden.dtype,
            **targets.of_the_loss(),
            **targets.of_the_chunks(),
        )

    def run(self) -> MultiTokenLoss:
        """Forward along each chain of heads, and back from its end."""
        for chain in self.heads.chains:
            recorded: list[_Recorded] = []
            for k in chain:
                recorded.append(self._forward(k, recorded[-1] if recorded else None))
            grad: Tensor | None = None
            while recorded:
                grad = self._backward(recorded.pop(), grad)
            if grad is not None and self.sums.wants(self.hidden):
                self.sums.add(self.hidden, grad)
        return self.accumulator.result()

    def _forward(self, k: int, before: _Recorded | None) -> _Recorded:
        """Head ``k`` on the output of the head before it in its chain, or on the trunk's."""
        x = self.hidden if before is None else before.state
        needs_x = self.sums.wants(x) if before is None else x.requires_grad
        x = x.detach().requires_grad_(needs_x)
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
        grad_normed = self.accumulator.add(head.k, head.normed.detach())
        pairs = [(p, s) for p, s in zip(head.parameters, head.stand_ins, strict=True) if s.requires_grad]
        inputs = [*([head.x] if head.x.requires_grad else []), *(s for _, s in pairs)]
        if not inputs or grad_normed is None:
            return None
        outputs, cotangents = [head.normed], [grad_normed]
        if grad_state is not None:
            outputs.append(head.state)
            cotangents.append(grad_state)
        # As a backward that the user calls outside autocast: what was computed in 16 bit goes back in 16 bit.
        with torch.autocast(head.x.device.type, enabled=False):
            grads = list(torch.autograd.grad(outputs, inputs, cotangents))
        grad_x = grads.pop(0) if head.x.requires_grad else None
        for (parameter, _), grad in zip(pairs, grads, strict=True):
            self.sums.add(parameter, grad)
        return grad_x
