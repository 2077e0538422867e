"""The key-value cache of the tokens that a model has read."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from typing import NamedTuple

import torch
from torch import Tensor


class Slots(NamedTuple):
    """Where a forward writes in a cache.

    Attributes:
        positions: Positions of the tokens: ``[S]`` if those of all rows are the same, else ``[B, S]``.
        end: The last position of any row, plus 1.
    """

    positions: Tensor
    end: int


class KVCache:
    """Keys and values by layer, row and position. A token's slot is its position.

    Rows may have different lengths. Slots beyond a row's length are stale or padding and are overwritten before any
    query sees them: a query at position ``p`` sees slots ``0..p``, which have been written by then. A forward writes
    the slots of its tokens; :meth:`advance` then sets how many of them are kept. All layers, and the heads after the
    trunk, therefore see the same positions within one step.

    Args:
        batch_size: ``B``.
        capacity: Maximum number of tokens per row.
    """

    def __init__(self, batch_size: int, capacity: int) -> None:
        self.batch_size, self.capacity = batch_size, capacity
        self.lengths = [0] * batch_size
        self._slots: dict[int, tuple[Tensor, Tensor]] = {}  # layer -> keys, values [B, capacity, H_kv, head_dim]

    @property
    def is_uniform(self) -> bool:
        """True if all rows have the same length."""
        return len(set(self.lengths)) <= 1

    @property
    def max_length(self) -> int:
        """The length of the longest row."""
        return max(self.lengths, default=0)

    def slots(self, n_new: int, device: torch.device, n_again: int = 0) -> Slots:
        """Returns the slots of each row's next ``n_new`` tokens and, before them, of its last ``n_again``.

        A row with fewer tokens starts at its first; its slots then end later.
        """
        if self.max_length + n_new > self.capacity:
            raise ValueError(f"the cache holds {self.capacity} tokens a row, got {self.max_length} + {n_new}")
        first = [max(0, length - n_again) for length in self.lengths]
        offsets = torch.arange(min(n_again, self.max_length) + n_new, device=device)
        end = max(first, default=0) + len(offsets)
        if len(set(first)) <= 1:
            return Slots(offsets + (end - len(offsets)), end)
        return Slots(torch.tensor(first, device=device)[:, None] + offsets, end)

    def write(self, layer: int, keys: Tensor, values: Tensor, slots: Slots) -> tuple[Tensor, Tensor]:
        """Stores new keys and values and returns those of all positions so far.

        Args:
            layer: Index of the attention layer.
            keys, values: ``[B, S, H_kv, head_dim]``.
            slots: From :meth:`slots`.
        Returns:
            Two views ``[B, L, H_kv, head_dim]``, ``L = slots.end``.
        """
        if layer not in self._slots:
            empty = [x.new_zeros(x.shape[0], self.capacity, *x.shape[2:]) for x in (keys, values)]
            self._slots[layer] = (empty[0], empty[1])
        positions, end = slots
        rows = torch.arange(self.batch_size, device=keys.device)[:, None]
        for stored, new in zip(self._slots[layer], (keys, values), strict=True):
            if positions.dim() == 1:
                stored[:, end - keys.shape[1] : end] = new
            else:
                stored[rows, positions] = new
        stored_keys, stored_values = self._slots[layer]
        return stored_keys[:, :end], stored_values[:, :end]

    def keep(self, path: Tensor) -> None:
        """Moves new tokens to the front of the new ones, in all layers.

        Args:
            path: ``[B, K]``, indices among the tokens last written.
        """
        first = torch.tensor(self.lengths, device=path.device)[:, None]
        rows, to = torch.arange(len(path), device=path.device)[:, None], torch.arange(path.shape[1], device=path.device)
        for stored in itertools.chain.from_iterable(self._slots.values()):
            stored[rows, first + to] = stored[rows, first + path]

    def advance(self, counts: Sequence[int]) -> None:
        """Advances row ``b`` by the first ``counts[b]`` of the tokens last written."""
        self.lengths = [length + count for length, count in zip(self.lengths, counts, strict=True)]

    def follow(self, running: AbstractSet[int]) -> None:
        """Gives all other rows, whose tokens are no longer wanted, the length of the longest of these.

        Such a row neither takes room nor makes lengths differ, so that a forward needs no mask where it needed none.
        """
        longest = max(self.lengths[row] for row in running)
        self.lengths = [length if row in running else longest for row, length in enumerate(self.lengths)]
