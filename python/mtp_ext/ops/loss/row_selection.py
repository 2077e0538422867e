"""Which rows of the heads are multiplied with the unembedding: those that carry a target, as far as the host knows.

On the CPU they are counted first. On a GPU their number stays on the device, where no host waits for it; what the host
does know bounds it: the length of the labels, and what the caller says (``max_valid``). So many rows of each head take
part, those with a target first, and rows without one among them are marked.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mtp_ext.ops.loss.device_rows import counts_stay_on, mark_rows, valid_rows_first
from mtp_ext.ops.loss.row_kernels import RowTargets

# To move rows together costs a pass over the gradient of the hidden states, 0.5 % of the GEMMs at V = 32k: not worth
# it for fewer than one row in so many.
WORTHWHILE_SHARE = 64


@dataclass(frozen=True)
class RowSelection:
    """The rows that take part, head by head."""

    rows: Tensor  # [offsets[-1]] int64, flat (head, b, s), or -1 where there is no target
    offsets: list[int]  # [n + 1]: head k's rows are rows[offsets[k] : offsets[k + 1]]
    rows_per_head: int  # B * S
    flat: Tensor  # rows with the index of the marked ones, too; every index once
    valid: Tensor | None = None  # [offsets[-1]] bool, whether a row is not marked; None: none is

    @staticmethod
    def of(selected: Tensor, n_valid: Tensor, rows_per_head: int, limits: Sequence[int]) -> RowSelection:
        """From the results of :func:`mtp_ext.ops.loss.row_kernels.select_rows`.

        Args:
            selected: ``[n * B * S]``, the rows that carry a target, then -1.
            n_valid: ``[n]``, how many there are of each head.
            rows_per_head: ``B * S``.
            limits: How many there are at most, of each head (:func:`most_rows`); used where counts stay on the device.
        """
        if not counts_stay_on(selected.device):
            offsets = _offsets(n_valid.tolist())
            rows = selected[: offsets[-1]]
            return RowSelection(rows, offsets, rows_per_head, rows)
        rows, valid = mark_rows(selected)
        n_rows = len(rows)
        if WORTHWHILE_SHARE * (n_rows - sum(limits)) < n_rows or n_rows == 0:
            limits = [rows_per_head] * len(limits)
            return RowSelection(rows, _offsets(limits), rows_per_head, torch.arange(n_rows, device=rows.device), valid)
        flat, valid = valid_rows_first(valid.view(len(limits), rows_per_head), limits)
        return RowSelection(torch.where(valid, flat, -1), _offsets(limits), rows_per_head, flat, valid)

    def pieces(self, begin: int, end: int) -> Iterator[tuple[int, slice, slice | Tensor]]:
        """Splits ``rows[begin:end]`` by head: ``(head, where in the chunk, which of the head's B * S rows)``."""
        for head in range(len(self.offsets) - 1):
            first, last = self.offsets[head], self.offsets[head + 1]
            low, high = max(begin, first), min(end, last)
            if low >= high:
                continue
            where = slice(low - begin, high - begin)
            if last - first == self.rows_per_head:  # every row takes part: consecutive
                yield head, where, slice(low - first, high - first)
            else:
                yield head, where, self.flat[low:high] - head * self.rows_per_head

    def sums_of_heads(self, x: Tensor) -> Tensor:
        """``[n]`` float64: the sums of ``x [offsets[-1]]`` over each head's rows."""
        # In float32 the sum over a large batch would lose digits.
        parts = [x[a:b].sum(dtype=torch.float64) for a, b in zip(self.offsets, self.offsets[1:], strict=False)]
        return torch.stack(parts)


def most_rows(targets: RowTargets, n_heads: int, max_valid: Sequence[int] | None) -> list[int]:
    """How many rows of each head can carry a target: the labels end somewhere, and the caller may know more.

    Args:
        targets: The labels.
        n_heads: ``n``.
        max_valid: The caller's bound for each head.
    """
    batch, label_len = targets.labels.shape
    within = [batch * min(targets.seq_len, max(0, label_len - targets.first_shift - k)) for k in range(n_heads)]
    return within if max_valid is None else [min(a, b) for a, b in zip(within, max_valid, strict=True)]


def _offsets(counts: Sequence[int]) -> list[int]:
    return [sum(counts[:k]) for k in range(len(counts) + 1)]
