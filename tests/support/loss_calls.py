"""Calls of the fused losses, and their comparison with the float64 reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mtp_ext.ops import MultiTokenLoss, linear_cross_entropy, multi_token_cross_entropy, reference

DIFFERENTIABLE = ("hidden", "weight", "bias", "head_weights")
FLOATING = (*DIFFERENTIABLE, "class_weights", "token_weights", "normalizer")
OF_CLASSES = ("weight", "bias", "class_weights")  # what a vocabulary shard holds a part of
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Arguments that bound memory or work and leave the value alone; the reference does not have them.
BOUNDS = ("chunk_rows", "workspace_bytes", "max_valid")


@dataclass
class Call:
    """A call of ``multi_token_cross_entropy`` (``heads``) or ``linear_cross_entropy``, in float64."""

    dtype: torch.dtype
    tensors: dict[str, Tensor]  # hidden, weight, labels, and optional ones
    options: dict[str, Any]
    heads: bool
    gradient_seed: int = 0
    wanted: tuple[str, ...] = DIFFERENTIABLE
    stacked: bool = True
    strided: bool = False


def make_generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@dataclass
class Shard:
    """The classes that a rank holds of a vocabulary sharded over ``group``."""

    classes: slice
    group: torch.distributed.ProcessGroup


CPU = torch.device("cpu")


def arguments(
    call: Call, dtype: torch.dtype, *, ours: bool, shard: Shard | None = None, device: torch.device = CPU
) -> dict[str, Any]:
    """Keyword arguments with inputs that hold the same numbers in every dtype: rounded to the call's, then widened."""
    made: dict[str, Any] = {}
    for name, value in call.tensors.items():
        if shard is not None and name in OF_CLASSES:
            value = value[..., shard.classes, :] if name == "weight" else value[shard.classes]
        if name in ("hidden", "weight", "bias"):
            value = value.to(call.dtype).to(dtype)
        elif name in FLOATING:
            rounded, held = (torch.promote_types(x, torch.float32) for x in (call.dtype, dtype))
            value = value.to(rounded).to(held)
        if call.strided and ours and value.dim() > 1:
            value = value.transpose(-1, -2).contiguous().transpose(-1, -2)
        value = value.to(device)
        made[name] = value.clone(memory_format=torch.preserve_format).requires_grad_(
            name in call.wanted and value.is_floating_point()
        )
    if ours and call.heads and not call.stacked:
        made["hidden"] = [h.detach().requires_grad_(h.requires_grad) for h in made["hidden"]]
    if not call.heads:
        made["targets"] = made.pop("labels")
    options = dict(call.options)
    if not ours:
        for name in BOUNDS:
            options.pop(name, None)
    if shard is not None:
        options["group"] = shard.group
    return made | options


@dataclass
class Results:
    values: dict[str, Tensor]
    exact: dict[str, Tensor]  # what must be equal whatever the dtype
    grads: dict[str, Tensor]


def run(
    call: Call, dtype: torch.dtype, *, ours: bool, shard: Shard | None = None, device: torch.device = CPU
) -> Results:
    """Values and gradients of the fused loss, or of the reference, for fixed incoming gradients; on the CPU."""
    function: Callable[..., Any]
    if ours:
        function = multi_token_cross_entropy if call.heads else linear_cross_entropy
    else:
        function = reference.multi_token_cross_entropy if call.heads else reference.linear_cross_entropy
    made = arguments(call, dtype, ours=ours, shard=shard, device=device)
    out = function(**made)
    values, exact = named_outputs(out)
    incoming = incoming_gradients(call, values)
    objective = torch.stack([(values[name] * x.to(values[name])).sum() for name, x in incoming.items()]).sum()
    leaves = {name: made[name] for name in DIFFERENTIABLE if name in made}
    flat = {name: x if isinstance(x, list) else [x] for name, x in leaves.items()}
    wanted = [x for xs in flat.values() for x in xs if x.requires_grad]
    # A reference whose heads are all detached has no graph: its gradients are zeros, as ours.
    has_graph = objective.requires_grad
    found = iter(torch.autograd.grad(objective, wanted, allow_unused=True) if has_graph else [None] * len(wanted))
    grads: dict[str, Tensor] = {}
    for name, xs in flat.items():
        if not xs[0].requires_grad:
            continue
        parts = [torch.zeros_like(x) if g is None else g for x in xs for g in [next(found)]]
        grads[name] = torch.stack(parts) if isinstance(leaves[name], list) else parts[0]
    return Results(*({name: x.cpu() for name, x in found.items()} for found in (values, exact, grads)))


def incoming_gradients(call: Call, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """The gradients, in float64, of the results that are differentiable."""
    g = make_generator(call.gradient_seed)
    shapes = {name: values[name].shape for name in ("loss", "lse") if name in values}
    return {name: torch.rand(shape, generator=g, dtype=torch.float64) for name, shape in shapes.items()}


def named_outputs(out: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    if isinstance(out, MultiTokenLoss):
        return {"loss": out.loss, "head_loss": out.head_loss}, {"n_valid": out.n_valid}
    if isinstance(out, tuple):
        return {"loss": out[0], "lse": out[1]}, {}
    return {"loss": out}, {}
