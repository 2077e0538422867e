"""Tensors that a head reads besides its input and its parameters, found in its graph so that none loses a gradient."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

_stand_ins = WeakIdKeyDictionary()  # of all forwards; a head that reads one of an earlier forward reads a stale tensor


def new_stand_in(parameter: Tensor, *, requires_grad: bool) -> Tensor:
    """Returns ``parameter`` detached: a leaf that a head runs with in its place."""
    stand_in = parameter.detach().requires_grad_(requires_grad)
    _stand_ins[stand_in] = None
    return stand_in


def next_sequence_number() -> int:
    """Returns the number that the next node of the autograd graph gets in this thread."""
    number: int = torch._C._autograd._get_sequence_nr()
    return number


def outside_leaves(k: int, outputs: Iterable[Tensor], known: Collection[Tensor], since: int) -> list[Tensor]:
    """Returns the leaves that require grad in a head's graph and are not in ``known``.

    Args:
        k: The head, for the message.
        outputs: The head's outputs.
        known: The leaves that it is known to read.
        since: :func:`next_sequence_number` before the head ran.
    Raises:
        RuntimeError: The head reads a tensor with a graph of its own, into which its backward must not go: that graph
            belongs to the backward of the step.
    """
    inside, found = {id(x) for x in known}, dict[int, Tensor]()
    nodes: list[Any] = [x.grad_fn for x in outputs if x.grad_fn is not None]
    seen = set(nodes)
    while nodes:
        for node, index in nodes.pop().next_functions:
            if node is None or node in seen:
                continue
            seen.add(node)
            leaf = getattr(node, "variable", None)
            if leaf is None and node._sequence_nr() < since and not _is_cached_cast(node):
                shape = list(node._input_metadata[index].shape)
                _refuse(k, f"a tensor {shape} (from {node.name()}) that is computed before the head runs")
            if leaf is None:
                nodes.append(node)
            elif id(leaf) not in inside:
                if leaf in _stand_ins:
                    _refuse(k, f"a tensor that an earlier forward computed from its parameter {list(leaf.shape)}")
                found[id(leaf)] = leaf
    return list(found.values())


def _is_cached_cast(node: Any) -> bool:
    """Returns True for the cast of a leaf, which autocast makes once and keeps."""
    return bool(node.name() == "ToCopyBackward0" and hasattr(node.next_functions[0][0], "variable"))


def check_nothing_learns(k: int, output: Tensor) -> None:
    """Raises RuntimeError if the output of a head without trainable parameters requires grad.

    Its loss is then computed without a gradient for the head's output.
    """
    if output.requires_grad:
        _refuse(k, "a tensor that requires grad, though neither its input nor its parameters do")


def _refuse(k: int, what: str) -> None:
    raise RuntimeError(
        f"head {k} reads {what}, besides its input and its parameters. schedule='sequential' cannot give it a "
        "gradient: detach it, or use schedule='joint'"
    )
