"""The number of logit rows held at once."""

from __future__ import annotations

from mtp_ext import _C


def chunk_size(
    n_rows: int,
    vocab_size: int,
    itemsize: int,
    *,
    chunk_rows: int | None,
    workspace_bytes: int | None,
    gpu_width: int | None = None,
) -> int:
    """Returns the rows per chunk: the caller's limit, else the rule of ``csrc/core/chunk_size.h``; chunks are balanced.

    Args:
        n_rows: Total number of rows.
        vocab_size: ``V``, the length of a row.
        itemsize: Bytes per logit.
        chunk_rows: Upper limit in rows; takes precedence.
        workspace_bytes: Upper limit for the chunk's logits in bytes (at least one row is held).
        gpu_width: ``D`` on a GPU, else None.
    """
    return _C.chunk_size(n_rows, vocab_size, itemsize, gpu_width or 0, chunk_rows or 0, workspace_bytes or 0)
