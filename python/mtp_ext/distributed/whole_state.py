"""State dicts that do not depend on the number of processes: shards to whole tensors and back."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mtp_ext.ops.common.runtime import is_dtensor


def whole(x: Any) -> Tensor:
    """Returns the whole of a DTensor, in every process that holds a part; a plain tensor as it is."""
    tensor: Tensor = x.full_tensor() if is_dtensor(x) else x
    return tensor


def whole_state(state: Any) -> Any:
    """Returns a state dict with the whole tensor, on the CPU, in place of every DTensor.

    All processes call it together, because each sends its shards. A GPU holds one whole tensor at a time.

    Args:
        state: Nested dicts and lists of tensors and other values, such as an optimizer's ``state_dict()``.
    """
    if isinstance(state, dict):
        return {key: whole_state(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(whole_state(value) for value in state)
    return whole(state).cpu() if is_dtensor(state) else state


def shard_like(value: Tensor, like: Any) -> Tensor:
    """Returns this process's part of a whole tensor, placed like ``like``; ``value`` itself if that is no DTensor.

    Nothing is sent: ``value`` is the same in every process.
    """
    if not is_dtensor(like):
        return value
    from torch.distributed.tensor import distribute_tensor

    mesh = like.device_mesh
    return distribute_tensor(value.to(like.device), mesh, like.placements, src_data_rank=None)
