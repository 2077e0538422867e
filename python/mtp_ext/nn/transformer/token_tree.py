"""Alternatives for the next tokens as a tree that one forward reads: each token sees its ancestors alone."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class TreeTables(NamedTuple):
    """A tree as tensors; ``S`` tokens, level by level, from the root."""

    depths: Tensor  # [S], 0 at the root
    ancestors: Tensor  # [S, S] bool, True where the row's token sees the column's: its ancestors and itself


@dataclass(frozen=True)
class TokenTree:
    """A tree whose tokens of one depth have the same number of children.

    Args:
        branches: The children of the root, of each of these, and so on.
    """

    branches: tuple[int, ...]

    @property
    def levels(self) -> tuple[int, ...]:
        """Tokens of each depth; 1 at the root."""
        return tuple(itertools.accumulate(self.branches, int.__mul__, initial=1))

    @property
    def size(self) -> int:
        """``S``."""
        return sum(self.levels)

    def tables(self, device: torch.device) -> TreeTables:
        """Returns the tree on a device."""
        return _tables(self.branches, device)

    def path(self, chosen: Tensor, children: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Follows the tokens that are chosen, from the root, as long as they are in the tree.

        Args:
            chosen: ``[B, S]``, the token chosen to follow each token of the tree.
            children: By depth of the parent, ``[B, branches]``: the different tokens that follow.
        Returns:
            ``[B, 1 + depth]``, the indices of the tokens on the way, the last one repeated where it ends early; and
            ``[B]``, how many of them follow the root.
        """
        rows = torch.arange(len(chosen), device=chosen.device)
        within = torch.zeros_like(rows)  # the level
        node, path, n_followed, follows = within, [within], within, torch.ones_like(rows, dtype=torch.bool)
        first = 0
        for level, tokens in zip(self.levels[:-1], children, strict=True):
            hits = tokens == chosen[rows, node, None]
            follows = follows & hits.any(1)
            within = torch.where(follows, within * tokens.shape[1] + hits.long().argmax(1), within)
            first += level
            node = torch.where(follows, first + within, node)
            n_followed = n_followed + follows
            path.append(node)
        return torch.stack(path, dim=1), n_followed


@functools.cache
def _tables(branches: tuple[int, ...], device: torch.device) -> TreeTables:
    parents, depths, level = [0], [0], range(1)
    for depth, count in enumerate(branches, 1):
        parents += [parent for parent in level for _ in range(count)]
        level = range(len(depths), len(parents))
        depths += [depth] * len(level)
    ancestors = torch.eye(len(parents), dtype=torch.bool)
    for i, parent in enumerate(parents[1:], 1):
        ancestors[i] |= ancestors[parent]
    return TreeTables(torch.tensor(depths, device=device), ancestors.to(device))
