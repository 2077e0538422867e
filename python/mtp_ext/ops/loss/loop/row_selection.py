"""Selects the rows to multiply with the unembedding.

The CPU counts the rows with a target. A GPU would have to synchronise to count them, so a host-side upper bound (label
length, ``max_valid``) is used: that many rows per head are processed, those with a target first, and rows without one
among them are marked -1. The row kernel zeroes the logits of a marked row, and :func:`copy_valid_rows` zeroes its
hidden states, so that nothing in it, NaN included, reaches a product.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mtp_ext.ops.common.backend import can_read
from mtp_ext.ops.loss.arguments import LossCall
from mtp_ext.ops.loss.row_kernels import SelectedRows

# Compaction costs one pass over the gradient of the hidden states, 0.5 % of the GEMMs at V = 32k; skip it unless at
# least 1/64 of the rows drop out.
WORTHWHILE_SHARE = 64


@dataclass(frozen=True)
class RowSelection:
    """The rows to process, head by head."""

    rows: Tensor  # [offsets[-1]] int64, flat (head, b, s), or -1 without a target
    offsets: list[int]  # [n + 1]: head k's rows are rows[offsets[k] : offsets[k + 1]]
    rows_per_head: int  # B * S
    order: Tensor | None = None  # like rows, with the indices of marked rows too, every index once; None: all in order
    valid: Tensor | None = None  # [offsets[-1]] bool, False at marked rows; None: no row is marked

    @staticmethod
    def of(selected: SelectedRows, call: LossCall) -> RowSelection:
        """Chooses the rows to process from those of :func:`mtp_ext.ops.loss.row_kernels.select_rows`, which are marked
        where the host cannot read their counts."""
        rows_per_head = call.rows_per_head
        if can_read(selected.counts):
            offsets = _offsets(selected.counts.tolist())
            rows = selected.rows[: offsets[-1]]
            return RowSelection(rows, offsets, rows_per_head, rows)
        limits = most_rows(call)
        rows, valid = selected.rows, selected.rows >= 0
        n_rows = len(rows)
        if WORTHWHILE_SHARE * (n_rows - sum(limits)) < n_rows or n_rows == 0:
            limits = [rows_per_head] * len(limits)
            return RowSelection(rows, _offsets(limits), rows_per_head, valid=valid)
        flat, valid = valid_rows_first(valid.view(len(limits), rows_per_head), limits)
        return RowSelection(torch.where(valid, flat, -1), _offsets(limits), rows_per_head, flat, valid)

    @functools.cached_property
    def flat(self) -> Tensor:
        """Like ``rows``, with the indices of marked rows too; every index once."""
        return torch.arange(len(self.rows), device=self.rows.device) if self.order is None else self.order

    def count(self, head: int) -> int:
        """The number of rows processed for a 0-based head."""
        return self.offsets[head + 1] - self.offsets[head]

    def pieces(self, begin: int, end: int) -> Iterator[tuple[int, slice, slice | Tensor]]:
        """Splits ``rows[begin:end]`` by head: ``(head, slice of the chunk, index into the head's B * S rows)``."""
        for head in range(len(self.offsets) - 1):
            first, last = self.offsets[head], self.offsets[head + 1]
            low, high = max(begin, first), min(end, last)
            if low >= high:
                continue
            where = slice(low - begin, high - begin)
            if last - first == self.rows_per_head:  # all rows, in order
                yield head, where, slice(low - first, high - first)
            else:
                yield head, where, self.flat[low:high] - head * self.rows_per_head

    def sums_of_heads(self, x: Tensor) -> Tensor:
        """Sums ``x [offsets[-1]]`` over each head's rows: ``[n]`` float64."""
        # A float32 sum over a large batch would lose digits.
        parts = [x[a:b].sum(dtype=torch.float64) for a, b in zip(self.offsets, self.offsets[1:], strict=False)]
        return torch.stack(parts)


def most_rows(call: LossCall) -> list[int]:
    """Upper bounds on each head's rows with a target, from the label length and ``max_valid``."""
    batch, label_len = call.labels.shape
    within = [batch * min(call.seq_len, max(0, label_len - call.first_shift - k)) for k in range(call.n_heads)]
    return within if call.max_valid is None else [min(a, b) for a, b in zip(within, call.max_valid, strict=True)]


def valid_rows_first(valid: Tensor, limits: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Moves each head's rows with a target to the front and returns the first ``limits[k]`` rows.

    Args:
        valid: ``[n, R]`` bool, True at rows with a target.
        limits: ``n`` numbers of at most ``R``. A head with the limit ``R`` keeps its order.
    Returns:
        ``flat`` ``[sum(limits)]`` int64, unique indices into ``n * R`` rows, and their ``valid``, bool.
    """
    n_rows = valid.shape[1]
    position = torch.arange(n_rows, device=valid.device)
    up_to_here = valid.cumsum(1)
    counts = up_to_here[:, -1:]
    slots = torch.where(valid, up_to_here - 1, counts + position - up_to_here)
    order = torch.empty_like(slots).scatter_(1, slots, position.expand_as(slots))
    flat, found = [], []
    for k, limit in enumerate(limits):
        moves = limit < n_rows
        flat.append((order[k, :limit] if moves else position) + k * n_rows)
        found.append(position[:limit] < counts[k] if moves else valid[k])
    return torch.cat(flat), torch.cat(found)


def copy_valid_rows(source: Tensor, valid: Tensor, zero: Tensor, out: Tensor) -> None:
    """Copies ``source[i]`` to ``out[i]`` where ``valid[i]``, else the 0-d ``zero``: ``[C, D]``, ``[C]``, ``[C, D]``."""
    keep = valid[:, None]
    if source.dtype == out.dtype:
        torch.where(keep, source, zero, out=out)
    else:
        out.copy_(torch.where(keep, source, zero))


def _offsets(counts: Sequence[int]) -> list[int]:
    return [sum(counts[:k]) for k in range(len(counts) + 1)]
