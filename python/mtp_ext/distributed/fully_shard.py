"""FSDP2 over a whole model, in the units that the schedules gather one by one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from mtp_ext.nn.multi_token_model import MultiTokenModel
from mtp_ext.nn.schedules.fsdp import sharded_modules

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, OffloadPolicy

_Model = TypeVar("_Model", bound=MultiTokenModel)


def fully_shard_(
    model: _Model,
    mesh: DeviceMesh | None = None,
    mp_policy: MixedPrecisionPolicy | None = None,
    reshard_after_forward: bool | int = True,
    *,
    offload_policy: OffloadPolicy | None = None,
    blocks: Sequence[nn.Module] | None = None,
) -> _Model:
    """Shards a model's parameters over processes with ``torch.distributed.fsdp.fully_shard``, in place.

    Each of the trunk's blocks, each head with a layer, the unembedding and each embedding becomes a unit, which is
    gathered alone where it is used. The model takes the rest: norms, and modules that share a parameter with another
    (a tied embedding and unembedding), gathered once per step. ``all_logits`` works as the call does.

    Args:
        model: :class:`mtp_ext.nn.MTPModel`, :class:`mtp_ext.nn.ComposedModel` or a result of ``from_huggingface``;
            the same values on every rank.
        mesh: One dimension, or two: replicate, shard. Default: all processes, on the accelerator if there is one.
        mp_policy: Mixed precision; default none.
        reshard_after_forward: As of ``fully_shard``. The sequential schedule releases heads and unembedding anyway.
        offload_policy: As of ``fully_shard``.
        blocks: The trunk's units; default the members of its outermost ``ModuleList`` or ``Sequential``.
    Returns:
        ``model``. Call it as before; optimizers are made after this.
    Raises:
        TypeError: ``model`` is none of these.
        ValueError: It is sharded already, ``blocks`` are not in its trunk, or there is no process group.
    """
    import torch.distributed as dist
    from torch.distributed.fsdp import MixedPrecisionPolicy, OffloadPolicy, fully_shard, register_fsdp_forward_method

    if not isinstance(model, MultiTokenModel):
        raise TypeError(f"model must be an MTPModel or a ComposedModel, got {type(model).__name__}")
    if sharded_modules(model.modules()):
        raise ValueError("model must not be sharded yet, got one with modules that fully_shard was called on")
    chosen = list(_listed(model.trunk) if blocks is None else blocks)
    inside = set(model.trunk.modules())
    if outside := [type(block).__name__ for block in chosen if block not in inside]:
        raise ValueError(f"blocks must be modules of model.trunk, got {outside[0]}, which is not in it")
    if mesh is None:
        if not dist.is_initialized():
            raise ValueError("mesh must be given where torch.distributed.init_process_group was not called, got None")
        device = torch.accelerator.current_accelerator() or torch.device("cpu")
        mesh = dist.device_mesh.init_device_mesh(device.type, (dist.get_world_size(),))
    common: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": mp_policy or MixedPrecisionPolicy(),
        "offload_policy": offload_policy or OffloadPolicy(),
    }
    for unit in _units(model, chosen):
        fully_shard(unit, reshard_after_forward=reshard_after_forward, **common)
    fully_shard(model, **common)
    register_fsdp_forward_method(model, "all_logits")
    return model


def _units(model: MultiTokenModel, blocks: Sequence[nn.Module]) -> list[nn.Module]:
    """Returns the modules that can be gathered alone: those that share no parameter with another."""
    heads = [model.heads.head(k) for k in range(1, model.heads.n_heads + 1)]
    # A head without a layer is a norm: too small for a collective of its own.
    units = [*blocks, *(head for head in heads if head.block is not None), model.unembed]
    covered = {module for unit in units for module in unit.modules()}
    units += [m for m in model.modules() if isinstance(m, nn.Embedding) and m not in covered]
    covered |= set(units)
    users: Counter[Tensor] = Counter(p for unit in units for p in unit.parameters())
    users.update(_direct_parameters(m for m in model.modules() if m not in covered))
    return [
        unit for unit in units if any(True for _ in unit.parameters()) and all(users[p] == 1 for p in unit.parameters())
    ]


def _direct_parameters(modules: Iterator[nn.Module]) -> Iterator[Tensor]:
    return (p for module in modules for p in module.parameters(recurse=False))


def _listed(module: nn.Module) -> Iterator[nn.Module]:
    """Yields the members of the outermost lists of modules."""
    is_list = isinstance(module, (nn.ModuleList, nn.Sequential))
    for child in module.children():
        if is_list and not isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield child
        else:
            yield from _listed(child)
