"""Shared by all schedules: the interface of the heads, and the order in which they run."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class HeadStack(Protocol):
    """The interface of the heads to the schedules; see :class:`mtp_ext.nn.heads.Heads`."""

    n_heads: int
    chains: tuple[tuple[int, ...], ...]
    recompute: bool
    softcap: float | None
    one_row: bool  # all heads have the same output
    reads_tokens: bool  # some head reads tokens ahead
    training: bool

    @property
    def vocab_size(self) -> int: ...

    def run(self, k: int, x: Tensor, context: Any) -> tuple[Tensor, Tensor]: ...

    def run_with(self, k: int, parameters: Sequence[Tensor], x: Tensor, context: Any) -> tuple[Tensor, Tensor]: ...

    def norm_together(self, wanted: Collection[int], x: Tensor) -> dict[int, Tensor] | None: ...

    def parameters_of(self, k: int) -> list[Tensor]: ...

    def modules_of(self, k: int) -> list[nn.Module]: ...


def chains_to_run(heads: HeadStack, active: Collection[int]) -> list[tuple[int, ...]]:
    """Returns the chains, each cut after its last active head; chains without one are left out."""
    found = []
    for chain in heads.chains:
        wanted = [i for i, k in enumerate(chain) if k in active]
        if wanted:
            found.append(chain[: wanted[-1] + 1])
    return found


def head_outputs(
    heads: HeadStack,
    hidden: Tensor,
    context: Any,
    active: Collection[int] | None = None,
    detach_heads: Collection[int] = (),
) -> dict[int, Tensor]:
    """Runs the heads under autograd and returns their normed outputs ``[B, S, D]`` by ``k``.

    Args:
        heads: The heads.
        hidden: ``[B, S, D]``, the trunk's output.
        context: The context of the trunk's forward.
        active: Which heads are wanted; default all.
        detach_heads: Heads that send no gradient to their input.
    """
    wanted = range(1, heads.n_heads + 1) if active is None else active
    again = heads.recompute and torch.is_grad_enabled()
    if not again and not any(k in detach_heads for k in wanted):
        together = heads.norm_together(wanted, hidden)
        if together is not None:
            return together
    outputs: dict[int, Tensor] = {}
    for chain in chains_to_run(heads, wanted):
        x = hidden
        for k in chain:
            x = x.detach() if k in detach_heads else x
            if again:
                x, outputs[k] = checkpoint(heads.run, k, x, context, use_reentrant=False)
            else:
                x, outputs[k] = heads.run(k, x, context)
    return {k: outputs[k] for k in sorted(outputs) if k in wanted}
