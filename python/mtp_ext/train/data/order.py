"""The order of rows in training and evaluation: deterministic, resumable, the same for any number of ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from mtp_ext.train.data.dataset import Dataset
from mtp_ext.train.data.packing import Batch, check_sizes, n_rows, pack


class TrainingStream(Iterator[Batch]):
    """Endless batches of a split: every epoch is a new random permutation of all rows.

    A batch may hold the last rows of one epoch and the first of the next, so all batches have the same size. Rows begin
    at the same tokens in every epoch. The position is the pair (epoch, index of the next row), so ``batch_size`` and
    ``world_size`` may change on resuming; the sequence of rows depends only on the seed.

    Args:
        dataset: The tokenised corpus.
        split: ``"train"`` or ``"validation"``.
        seq_len: Tokens per row, ``S``.
        n_future: Additional labels per row, after its tokens.
        batch_size: Rows per batch over all ranks.
        seed: Seed of the order.
        rank: Rank of this process in ``[0, world_size)``; it gets its contiguous share of each batch.
        world_size: Number of processes; divides ``batch_size``.
    Raises:
        ValueError: A size is not positive, ``rank`` is out of range, ``batch_size`` is not divisible by ``world_size``,
            or the split is empty.
    """

    def __init__(
        self,
        dataset: Dataset,
        split: str,
        seq_len: int,
        n_future: int,
        batch_size: int,
        seed: int,
        *,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        check_sizes(seq_len, n_future, batch_size)
        if seed < 0:
            raise ValueError(f"seed must be a non-negative integer, got {seed}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in [0, world_size), got rank {rank} and world_size {world_size}")
        if batch_size % world_size:
            raise ValueError(f"batch_size must be a multiple of world_size {world_size}, got {batch_size}")
        self._split, self._separator_id = dataset.split(split), dataset.tokenizer.separator_id
        self._seq_len, self._n_future, self._batch_size, self._seed = seq_len, n_future, batch_size, seed
        self._identity = {"dataset": dataset.fingerprint, "split": split, "seq_len": seq_len, "seed": seed}
        share = batch_size // world_size
        self._share = slice(rank * share, (rank + 1) * share)
        self.rows_per_epoch = n_rows(self._split, seq_len)
        self._epoch, self._index = 0, 0
        self._order = self._shuffled(0)

    @property
    def epochs(self) -> float:
        """Number of passes over the split so far."""
        return self._epoch + self._index / self.rows_per_epoch

    def __next__(self) -> Batch:
        rows = self._next_rows()[self._share]
        return pack(self._split, rows, self._seq_len, self._n_future, self._separator_id)

    def state_dict(self) -> dict[str, Any]:
        """Returns the position of the next batch and the identity of the order, as integers and strings."""
        return {"epoch": self._epoch, "index": self._index, **self._identity}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues with the batch that would have followed ``state``.

        Raises:
            ValueError: ``state`` belongs to another order: another corpus, tokenizer, split, sequence length or seed.
        """
        for name, value in self._identity.items():
            if state[name] != value:
                raise ValueError(f"{name} of the data order is {value!r}, but the state to resume has {state[name]!r}")
        epoch, index = state["epoch"], state["index"]
        if epoch < 0 or not 0 <= index < self.rows_per_epoch:
            raise ValueError(f"the state to resume is not a position in the data order: epoch {epoch}, index {index}")
        self._epoch, self._index = epoch, index
        self._order = self._shuffled(epoch)

    def _next_rows(self) -> npt.NDArray[np.int64]:
        """Returns the rows of the next batch over all ranks."""
        parts: list[npt.NDArray[np.int64]] = []
        missing = self._batch_size
        while missing:
            part = self._order[self._index : self._index + missing]
            parts.append(part)
            missing -= part.size
            self._index += part.size
            if self._index == self.rows_per_epoch:
                self._epoch, self._index = self._epoch + 1, 0
                self._order = self._shuffled(self._epoch)
        return np.concatenate(parts)

    def _shuffled(self, epoch: int) -> npt.NDArray[np.int64]:
        """Returns the order of one epoch, which depends only on the seed and the epoch."""
        return np.random.default_rng([self._seed, epoch]).permutation(self.rows_per_epoch)


def evaluation_batches(
    dataset: Dataset, split: str, seq_len: int, n_future: int, batch_size: int, max_tokens: int | None = None
) -> Iterator[Batch]:
    """Yields the rows of a split in order, each once; the last batch may have fewer rows.

    Args:
        dataset: The tokenised corpus.
        split: ``"train"`` or ``"validation"``.
        seq_len: Tokens per row, ``S``.
        n_future: Additional labels per row, after its tokens.
        batch_size: Rows per batch.
        max_tokens: Maximum number of tokens, rounded down to rows but at least one, spread evenly over the split.
    Raises:
        ValueError: A size is not positive, or the split is empty.
    """
    check_sizes(seq_len, n_future, batch_size)
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
    tokens, separator_id = dataset.split(split), dataset.tokenizer.separator_id
    total = n_rows(tokens, seq_len)
    chosen = total if max_tokens is None else min(total, max(1, max_tokens // seq_len))
    rows = np.arange(chosen, dtype=np.int64) * total // chosen
    return (
        pack(tokens, rows[first : first + batch_size], seq_len, n_future, separator_id)
        for first in range(0, chosen, batch_size)
    )
