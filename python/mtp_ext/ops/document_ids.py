"""Document ids from the boundaries that variable-length attention takes."""

from __future__ import annotations

import torch
from torch import Tensor

from mtp_ext.ops.common import checks
from mtp_ext.ops.common.backend import can_read


def document_ids(cu_seqlens: Tensor, length: int) -> Tensor:
    """Makes the document ids of a packed row.

    Args:
        cu_seqlens: ``[n + 1]`` int32 or int64, the boundaries of ``n`` documents: 0, then where each of them ends.
        length: Tokens of the row, with its labels if they are longer. Those after the last document are one of their
            own.

    Returns:
        ``[1, length]`` int64 on the device of ``cu_seqlens``, without a GPU sync; for the ``document_ids`` of
        :func:`mtp_ext.multi_token_cross_entropy` and of the models.

    Raises:
        TypeError, ValueError: An argument of wrong type, dtype, shape or range; on a GPU boundaries are not read.

    Example:
        >>> import torch
        >>> document_ids(torch.tensor([0, 2, 5]), 6)
        tensor([[0, 0, 1, 1, 1, 2]])
    """
    checks.check_tensor("cu_seqlens", cu_seqlens, dtypes=checks.INDEX_DTYPES, shape="[n + 1]")
    checks.check_int("length", length)
    length = checks.python_number(length)
    if cu_seqlens.dim() != 1 or len(cu_seqlens) == 0:
        raise ValueError(f"cu_seqlens must be [n + 1], got {checks.describe(cu_seqlens)}")
    if length < 0:
        raise ValueError(f"length must be at least 0, got {length}")
    if can_read(cu_seqlens):
        bounds = cu_seqlens.tolist()
        if bounds[0] != 0 or bounds != sorted(bounds) or bounds[-1] > length:
            raise ValueError(f"cu_seqlens must ascend from 0 to at most length={length}, got {bounds}")
    positions = torch.arange(length, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    return torch.bucketize(positions, cu_seqlens[1:].contiguous(), right=True)[None]
