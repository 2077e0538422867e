"""How many rows of logits are held at once."""

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
    """Rows of one chunk: what the caller asked for, else the rule of ``csrc/core/chunk_size.h``; balanced over chunks.

    Args:
        n_rows: Rows in all.
        vocab_size: ``V``, the length of a row.
        itemsize: Bytes of one logit.
        chunk_rows: An upper limit in rows; takes precedence.
        workspace_bytes: An upper limit for the chunk's logits in bytes (at least one row is held).
        gpu_width: ``D``, where the rows are multiplied on a GPU.
    """
    return _C.chunk_size(n_rows, vocab_size, itemsize, gpu_width or 0, chunk_rows or 0, workspace_bytes or 0)
