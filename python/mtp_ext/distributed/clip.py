"""Clips gradients that live on several meshes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from mtp_ext.distributed.whole_state import whole
from mtp_ext.ops.common.runtime import is_dtensor


@torch.no_grad()
def clip_grad_norm_(parameters: Tensor | Iterable[Tensor], max_norm: float) -> Tensor:
    """Scales gradients in place so that the 2-norm of all of them together is at most ``max_norm``.

    ``torch.nn.utils.clip_grad_norm_`` for parameters that are sharded over different meshes, or partly not sharded. The
    result is the same on every rank, and no GPU is synchronised with.

    Args:
        parameters: Parameters, DTensors of any meshes and placements or plain tensors; read once. A plain tensor's
            gradient is taken to be the same on every rank, as after DDP. Each rank passes the same parameters in the
            same order; those without a gradient are passed over.
        max_norm: The limit, not negative; infinity only measures.
    Returns:
        The norm before clipping, a plain 0-d tensor on the first gradient's device.
    Raises:
        ValueError: ``max_norm`` is negative or NaN.
    """
    if not max_norm >= 0:
        raise ValueError(f"max_norm must be a number of at least 0, got {max_norm!r}")
    found = [parameters] if isinstance(parameters, Tensor) else parameters
    grads: list[Any] = [p.grad for p in found if p.grad is not None]
    if not grads:
        return torch.zeros(())
    by_mesh: dict[Any, list[Any]] = {}
    for grad in grads:
        by_mesh.setdefault(grad.device_mesh if is_dtensor(grad) else None, []).append(grad)
    norms = [whole(get_total_norm(of_mesh)).to(grads[0].device) for of_mesh in by_mesh.values()]
    norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)  # as torch.nn.utils.clip_grads_with_norm_
    by_device: dict[torch.device, list[Tensor]] = {}
    for grad in grads:
        by_device.setdefault(grad.device, []).append(grad.to_local() if is_dtensor(grad) else grad)
    for device, of_device in by_device.items():
        torch._foreach_mul_(of_device, factor.to(device, non_blocking=True))
    return norm
