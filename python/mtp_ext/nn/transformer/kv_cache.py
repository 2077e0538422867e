"""The key-value cache of the tokens that a model has read."""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet

import torch
from torch import Tensor


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

    def positions(self, n_new: int, device: torch.device) -> Tensor:
        """Positions of the next ``n_new`` tokens: ``[n_new]`` if all rows have the same length, else ``[B, n_new]``."""
        if self.max_length + n_new > self.capacity:
            raise ValueError(f"the cache holds {self.capacity} tokens a row, got {self.max_length} + {n_new}")
        new = torch.arange(n_new, device=device)
        if self.is_uniform:
            return new + self.max_length
        return torch.tensor(self.lengths, device=device)[:, None] + new

    def write(self, layer: int, keys: Tensor, values: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Stores new keys and values and returns those of all positions so far.

        Args:
            layer: Index of the attention layer.
            keys, values: ``[B, S, H_kv, head_dim]``.
            positions: From :meth:`positions`.
        Returns:
            Two views ``[B, L, H_kv, head_dim]``, ``L = max_length + S``.
        """
        if layer not in self._slots:
            shape = (keys.shape[0], self.capacity, *keys.shape[2:])
            self._slots[layer] = (keys.new_zeros(shape), values.new_zeros(shape))
        end = self.max_length + keys.shape[1]
        rows = torch.arange(self.batch_size, device=keys.device)[:, None]
        for stored, new in zip(self._slots[layer], (keys, values), strict=True):
            if positions.dim() == 1:
                stored[:, self.max_length : end] = new
            else:
                stored[rows, positions] = new
        stored_keys, stored_values = self._slots[layer]
        return stored_keys[:, :end], stored_values[:, :end]

    def advance(self, counts: Sequence[int]) -> None:
        """Advances row ``b`` by the first ``counts[b]`` of the tokens last written."""
        self.lengths = [length + count for length, count in zip(self.lengths, counts, strict=True)]

    def follow(self, running: AbstractSet[int]) -> None:
        """Gives all other rows, whose tokens are no longer wanted, the length of the longest of these.

        Such a row neither takes room nor makes lengths differ, so that a forward needs no mask where it needed none.
        """
        longest = max(self.lengths[row] for row in running)
        self.lengths = [length if row in running else longest for row, length in enumerate(self.lengths)]
