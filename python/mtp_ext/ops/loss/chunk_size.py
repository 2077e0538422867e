"""The number of logit rows held at once."""

from __future__ import annotations

import torch
from torch import Tensor

from mtp_ext import _C
from mtp_ext.ops.common.backend import backend_of
from mtp_ext.ops.loss.arguments import LossCall


def chunk_size(
    n_rows: int,
    vocab_size: int,
    itemsize: int,
    *,
    chunk_rows: int | None,
    workspace_bytes: int | None,
    gpu_width: int | None = None,
    sum_width: int | None = None,
) -> int:
    """Returns the rows per chunk: the caller's limit, else the rule of ``csrc/core/chunk_size.h``; chunks are balanced.

    Args:
        n_rows: Total number of rows.
        vocab_size: ``V``, the length of a row.
        itemsize: Bytes per logit.
        chunk_rows: Upper limit in rows; takes precedence.
        workspace_bytes: Upper limit for the chunk's logits in bytes (at least one row is held).
        gpu_width: ``D`` on a GPU, else None.
        sum_width: ``D`` where a single chunk makes a float32 sum ``[V, D]`` unnecessary, else None.
    """
    return _C.chunk_size(
        n_rows, vocab_size, itemsize, gpu_width or 0, chunk_rows or 0, workspace_bytes or 0, sum_width or 0
    )


def fits_one_chunk(call: LossCall, weight: Tensor) -> bool:
    """Returns True if one chunk holds all rows of each unembedding, whose gradient then needs no float32 sum.

    It is stored in ``weight``'s dtype. float16 is excluded: its loss scale is only known in backward.
    """
    backend, dtype = backend_of(weight.device), call.compute_dtype
    if not weight.dtype == dtype == backend.logits_dtype(dtype) == torch.bfloat16:
        return False
    replicated = weight.dim() == 3
    if call.grad_weight_out is not None or call.group is not None or (call.detach_weight and not replicated):
        return False
    vocab_size, width = weight.shape[-2:]
    rows = call.rows_per_head * (1 if replicated else call.n_heads)
    size = chunk_size(
        rows,
        vocab_size,
        dtype.itemsize,
        chunk_rows=call.chunk_rows,
        workspace_bytes=call.workspace_bytes,
        gpu_width=None if backend.sees_values else width,
        sum_width=width,
    )
    return size >= rows
