"""The CPU loss of any number of heads in one native call (``csrc/ops/fused_loss_cpu.cpp``)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mtp_ext.ops.common import checks
from mtp_ext.ops.common.backend import backend_of
from mtp_ext.ops.common.result import RowTables
from mtp_ext.ops.loss.arguments import Gradients, LossCall, Needs, WeightSums, saved_grad_dtype
from mtp_ext.ops.loss.chunk_size import chunk_size
from mtp_ext.ops.loss.loop.chunk_gemms import WIDEN_TILE_ROWS
from mtp_ext.ops.loss.row_kernels import prepared, select_rows

# FusedLossFlag in csrc/ops/fused_loss_cpu.cpp.
FLAG_MEASURES, FLAG_HIDDEN, FLAG_WEIGHT, FLAG_BIAS, FLAG_ACCUMULATE, FLAG_WIDEN, FLAG_ONE_CHUNK = (
    1 << i for i in range(7)
)


class HeadSums(NamedTuple):
    """Sums over the rows of each head; float32, or float64 for float64 operands."""

    loss: Tensor  # 0-d
    head_loss: Tensor  # [n]
    n_valid: Tensor  # [n] int64
    divisors: Tensor  # [n], of each head's sum


def fused_loss(
    call: LossCall,
    weight: Tensor,
    hidden: Sequence[Tensor],
    needs: Needs,
    sums: WeightSums | None = None,
    *,
    one_chunk: bool = False,
) -> tuple[HeadSums, RowTables, Gradients]:
    """Computes loss, tables and gradients of all heads of ``call``.

    Args:
        call: Prepared.
        weight: ``[V, D]``, or ``[n, V, D]``.
        hidden: Each head's ``[..., D]`` of ``B * S`` rows, or one tensor with the ``n * B * S`` rows of all.
        needs: Which gradients to compute.
        sums: Buffers for the sums of the weight and bias gradients; default new memory.
        one_chunk: See :func:`mtp_ext.ops.loss.chunk_size.fits_one_chunk`; without ``sums``.
    Raises:
        ValueError: A target outside ``[0, V)`` that is not ``ignore_index``; nothing has been written.
    """
    packed = call.pack()
    widens = backend_of(weight.device).logits_dtype(call.compute_dtype) != call.compute_dtype
    results, first_invalid = torch.ops.mtp_ext._fused_loss_.default(
        hidden,
        weight,
        packed.tensors,
        packed.options,
        packed.sizes + packed.detach_weight,
        packed.compute_dtype,
        FLAG_MEASURES
        + FLAG_HIDDEN * needs.hidden
        + FLAG_WEIGHT * needs.weight
        + FLAG_BIAS * needs.bias
        + FLAG_ACCUMULATE * (sums is not None and sums.accumulate)
        + FLAG_WIDEN * widens
        + FLAG_ONE_CHUNK * one_chunk,
        [] if sums is None else [x for x in (sums.weight, sums.bias) if x is not None],
    )
    checks.check_first_invalid(first_invalid, call.labels, weight.shape[-2], call.ignore_index)
    found = iter(results)
    totals = HeadSums._make(itertools.islice(found, len(HeadSums._fields)))
    tables = RowTables._make(itertools.islice(found, len(RowTables._fields)))
    gradients = Gradients(
        weight=next(found) if needs.weight else None,
        bias=next(found) if needs.bias else None,
        hidden=list(found),
    )
    return totals, tables, gradients


@torch.library.register_fake("mtp_ext::_fused_loss_")  # type: ignore[untyped-decorator]
def _(
    hidden: Sequence[Tensor],
    weight: Tensor,
    tensors: Sequence[Tensor | None],
    options: Sequence[float],
    sizes: Sequence[int],
    compute_dtype: torch.dtype,
    flags: int,
    sums: Sequence[Tensor],
) -> tuple[list[Tensor], int]:
    acc = torch.float64 if compute_dtype == torch.float64 else torch.float32
    n, labels = sizes[1], tensors[0]
    assert labels is not None
    table = (n, labels.shape[0], sizes[0])

    weight_sum = weight.dtype if flags & FLAG_ONE_CHUNK else acc

    def new(*shape: int, dtype: torch.dtype = acc) -> Tensor:
        return weight.new_empty(shape, dtype=dtype)

    results = [new()]
    if flags & FLAG_MEASURES:
        results += [new(n), new(n, dtype=torch.int64), new(n)]
        results += RowTables.zeros(*table, dtype=acc, device=weight.device)
    given = iter(sums)  # buffers of the needed gradients, or none
    results += [next(given) if sums else new(*weight.shape, dtype=weight_sum)] if flags & FLAG_WEIGHT else []
    results += [next(given) if sums else new(weight.shape[-2])] if flags & FLAG_BIAS else []
    results += [h.new_empty(h.shape, dtype=saved_grad_dtype(h)) for h in hidden] if flags & FLAG_HIDDEN else []
    return results, -1


def scratch_bytes(
    hidden: Sequence[Tensor], weight: Tensor, sizes: Sequence[int], compute_dtype: torch.dtype, flags: int
) -> tuple[int, int]:
    """Counts the bytes that a call of the operator with these arguments allocates, beside its results, for all rows.

    Returns:
        The chunk of logits, which is kept for the next call up to ``_C.KEPT_BYTES``, and the operands of its products.
    """
    (vocab_size, width), heads = weight.shape[-2:], sizes[1]
    widens = bool(flags & FLAG_WIDEN)
    item = torch.float32.itemsize if widens else compute_dtype.itemsize
    rows = sum(h.numel() for h in hidden) // width // (heads if weight.dim() == 3 else 1)
    chunk = chunk_size(
        rows,
        vocab_size,
        item,
        chunk_rows=sizes[4] or None,
        workspace_bytes=sizes[5] or None,
        sum_width=width if flags & FLAG_ONE_CHUNK else None,
    )
    copied = min(WIDEN_TILE_ROWS, vocab_size) if widens else vocab_size * (weight.dtype != compute_dtype)
    copies = 2 * chunk * (heads > 1 or widens or hidden[0].dtype != compute_dtype)  # rows picked, and their gradient
    return chunk * vocab_size * item, (copied + copies) * width * item


def check_max_valid(call: LossCall, weight: Tensor) -> None:
    """Raises ValueError if a head of a prepared call has more than ``max_valid`` targets."""
    if call.max_valid is not None:
        checks.check_max_valid(select_rows(call, weight.shape[-2]).counts, call.max_valid)


class NativeHeads:
    """The loss of the rows of ``n`` heads in native calls, with the interface of
    :class:`mtp_ext.ops.loss.loop.row_loop.RowLoop`."""

    gradient_unscale: Tensor | None = None

    def __init__(self, call: LossCall, weight: Tensor, needs: Needs) -> None:
        self.call, self.weight, self.needs = prepared(call), weight.detach(), needs
        selected = select_rows(self.call, weight.shape[-2])
        checks.check_targets_in_range(self.call.labels, selected.first_invalid, weight.shape[-2], call.ignore_index)
        checks.check_max_valid(selected.counts, call.max_valid)
        self.n_valid = selected.counts
        self.divisors = torch.ones(call.n_heads, dtype=call.acc_dtype, device=weight.device)
        self._tables = RowTables.zeros(call.n_heads, *call.row_shape, dtype=call.acc_dtype, device=weight.device)

    def row_tables(self) -> RowTables:
        """Returns the tables of the heads run so far, ``[n, B, S]``; losses include their token weights."""
        return self._tables

    def run(self, heads: range, hidden: Sequence[Tensor], sums: WeightSums) -> Sequence[Tensor | None]:
        """Processes the rows of ``heads``, 0-based and consecutive; returns the gradients of ``hidden``."""
        call, weight = self.call.of_heads(heads), self.weight
        if weight.dim() == 3:
            weight = weight[heads.start : heads.stop]
        found, tables, gradients = fused_loss(call, weight, hidden, self.needs, sums)
        self.divisors[heads.start : heads.stop] = found.divisors
        for table, part in zip(self._tables, tables, strict=True):
            table[heads.start : heads.stop] = part
        return gradients.hidden
