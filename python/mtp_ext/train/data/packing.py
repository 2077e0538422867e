"""Packed sequences: rows of ``seq_len`` tokens across document boundaries, with the labels of every head.

Row ``i`` holds the tokens from ``i * seq_len`` on, and ``n_future`` more labels than tokens. Over the rows of a split,
every token is an input once, and every token with ``k`` predecessors in its document is a target of head ``k`` once.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mtp_ext.train.data.shards import TokenSplit

IGNORE_INDEX = -100


class Batch(NamedTuple):
    """Rows of packed tokens (``S' = S + n_future``).

    Attributes:
        tokens: ``[B, S]`` int64; the separator past the end of the split.
        labels: ``[B, S']`` int64, unshifted: ``labels[:, :S] == tokens``, but ``IGNORE_INDEX`` past the split's end.
        document_ids: ``[B, S']`` int64, numbered from 0 in each row; positions past the end are their own document.
    """

    tokens: Tensor
    labels: Tensor
    document_ids: Tensor

    @property
    def n_tokens(self) -> int:
        """Number of tokens without the padding after the end of the split."""
        return int((self.labels[:, : self.tokens.shape[1]] != IGNORE_INDEX).sum())


def n_rows(split: TokenSplit, seq_len: int) -> int:
    """Returns the number of rows of ``seq_len`` tokens in a split; the last one may be short."""
    return -(-split.n_tokens // seq_len)


def pack(split: TokenSplit, rows: npt.NDArray[np.int64], seq_len: int, n_future: int, separator_id: int) -> Batch:
    """Reads rows of a split.

    Args:
        split: The tokens.
        rows: ``[B]``, each in ``[0, n_rows(split, seq_len))``.
        seq_len: Tokens per row, ``S``.
        n_future: Additional labels per row, after its tokens.
        separator_id: Padding of the last row's tokens.
    """
    width = seq_len + n_future
    starts = rows * seq_len
    labels = np.full((rows.size, width), IGNORE_INDEX, dtype=np.int64)
    for row, start in zip(labels, starts.tolist(), strict=True):
        ids = split.read(start, start + width)
        row[: ids.size] = ids
    positions = starts[:, None] + np.arange(width)
    # The number of documents that begin at or before each position; the end of the split counts as a beginning.
    documents = np.searchsorted(split.document_starts, positions, side="right")
    documents -= documents[:, :1]
    inputs = labels[:, :seq_len]
    tokens = np.where(inputs == IGNORE_INDEX, separator_id, inputs)
    return Batch(torch.from_numpy(tokens), torch.from_numpy(labels), torch.from_numpy(documents))


def check_sizes(seq_len: int, n_future: int, batch_size: int) -> None:
    """Raises ValueError if a size is not positive."""
    for name, size in (("seq_len", seq_len), ("n_future", n_future), ("batch_size", batch_size)):
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
