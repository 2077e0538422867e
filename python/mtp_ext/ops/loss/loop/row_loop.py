"""The row-chunk loop: logits of a few rows, their loss, their gradient in place, and the products with it.

Each chunk takes three GEMMs (6 N D V FLOP in total). Nothing of size ``N x V`` is ever stored. It serves GPUs, where
counting rows would sync, and sharded vocabularies, whose ranks communicate after every chunk; the native CPU call
(:mod:`mtp_ext.ops.loss.native_cpu`) is this loop in C++.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mtp_ext.ops.common import checks
from mtp_ext.ops.common.backend import backend_of, can_read
from mtp_ext.ops.common.result import RowTables
from mtp_ext.ops.common.workspace import empty
from mtp_ext.ops.loss.arguments import LossCall, Needs, WeightSums, saved_grad_dtype
from mtp_ext.ops.loss.chunk_size import chunk_size
from mtp_ext.ops.loss.loop.chunk_gemms import ChunkGemms
from mtp_ext.ops.loss.loop.head_terms import HeadTerms
from mtp_ext.ops.loss.loop.row_selection import RowSelection, copy_valid_rows
from mtp_ext.ops.loss.loop.vocabulary_shard import VocabularyShard
from mtp_ext.ops.loss.row_kernels import loss_rows_, prepared, select_rows


@dataclass
class _ChunkGradients:
    """Output buffers for the chunks' gradients; None, or an empty mapping, if not needed."""

    hidden: Mapping[int, Tensor]  # by head, [B * S, D], zeros at rows without a target
    weight: Tensor | None  # [V, D]
    bias: Tensor | None  # [V], a running sum
    accumulate: bool  # add to weight instead of overwriting it

    @property
    def needed(self) -> bool:
        """True if any gradient is needed."""
        return bool(self.hidden) or self.weight is not None or self.bias is not None


class RowLoop:
    """The loss of the rows of ``n`` heads; :meth:`run` may be called for any heads, each once, in any order.

    Args:
        call: The arguments of the loss.
        weight: ``[V, D]`` or ``[n, V, D]``; with a group, shard sizes are cached by its identity.
        needs: Which gradients to compute.
    Raises:
        ValueError: On the CPU or with debug checks, a target outside ``[0, V)`` that is not ``ignore_index``, or more
            than ``max_valid``.
    """

    def __init__(self, call: LossCall, weight: Tensor, needs: Needs) -> None:
        self.call, self.weight, self.needs = prepared(call), weight.detach(), needs
        call = self.call
        self.shard = None if call.group is None else VocabularyShard.of(weight, call.group)
        self._vocab_size = weight.shape[-2] if self.shard is None else self.shard.total
        selected = select_rows(call, self._vocab_size, marked=not can_read(call.labels))
        checks.check_targets_in_range(call.labels, selected.first_invalid, self._vocab_size, call.ignore_index)
        checks.check_max_valid(selected.counts, call.max_valid)
        self.n_valid = selected.counts
        self.selection = RowSelection.of(selected, call)
        self._buffers: dict[str, Tensor] = {}
        self._gemms: dict[int, ChunkGemms] = {}

    # Nothing that the first product does not need is made before it: a GPU then multiplies while the host prepares.

    @functools.cached_property
    def terms(self) -> HeadTerms:
        """The weights of the rows."""
        return HeadTerms.of(self.call, self.selection, self.n_valid, self._vocab_size, self.shard)

    @functools.cached_property
    def _tables(self) -> RowTables:
        call = self.call
        return RowTables.zeros(call.n_heads, *call.row_shape, dtype=call.acc_dtype, device=self.weight.device)

    @functools.cached_property
    def _zero(self) -> Tensor:
        return self.weight.new_zeros(())

    @property
    def divisors(self) -> Tensor:
        """The divisor of each head's sum, ``[n]``."""
        return self.terms.divisors

    @property
    def gradient_unscale(self) -> Tensor | None:
        """A 0-d factor that the sums of :meth:`run` lack."""
        return self.terms.gradient_unscale

    def row_tables(self) -> RowTables:
        """Returns the tables of the heads run so far, ``[n, B, S]``; losses include their token weights."""
        losses = self.terms.weighted(self._tables.loss.flatten())
        return self._tables._replace(loss=losses.view(self._tables.loss.shape))

    def run(self, heads: range, hidden: Sequence[Tensor], sums: WeightSums) -> Sequence[Tensor | None]:
        """Processes the rows of ``heads``.

        Args:
            heads: 0-based and consecutive.
            hidden: One ``[..., D]`` with ``B * S`` rows per head, or one tensor with the rows of all.
            sums: Buffers for the gradients of weight and bias; of a replicated weight, the slice of these heads.
        Returns:
            The gradients of ``hidden``, in its form.
        """
        grads = [empty(h.shape, saved_grad_dtype(h), h.device) for h in hidden] if self.needs.hidden else []
        rows = dict(zip(heads, self._rows_of_heads(len(heads), [h.detach() for h in hidden]), strict=True))
        grad_rows = dict(zip(heads, self._rows_of_heads(len(heads), grads), strict=False))
        for k, grad in grad_rows.items():
            if self.selection.count(k) < self.selection.rows_per_head:
                grad.zero_()
        written = sums.accumulate
        for part in self._ranges(heads):
            grad_weight = sums.weight
            if grad_weight is not None and grad_weight.dim() == 3:
                grad_weight, written = grad_weight[part.start - heads.start], sums.accumulate
            out = _ChunkGradients(grad_rows, grad_weight, sums.bias, accumulate=written)
            if part.start + 1 in self.call.detach_weight:
                out.weight = None
            self._run_range(part, rows, out)
            written = written or out.accumulate
            if grad_weight is not None and sums.weight is not grad_weight and not written:
                grad_weight.zero_()
        if sums.weight is not None and self.weight.dim() == 2 and not written:
            sums.weight.zero_()
        if self.gradient_unscale is not None:
            for grad in grads:
                grad.mul_(self.gradient_unscale)
        return grads

    def _rows_of_heads(self, n_heads: int, given: Sequence[Tensor]) -> list[Tensor]:
        """Views the input, one tensor per head or one with the rows of all, as ``[B * S, D]`` per head."""
        if len(given) == n_heads:
            return [x.reshape(-1, x.shape[-1]) for x in given]
        return [part for x in given for part in x.reshape(n_heads, -1, x.shape[-1]).unbind(0)]

    def _ranges(self, heads: range) -> list[range]:
        """Ranges of heads whose rows may share a chunk: the same unembedding, all or none in ``detach_weight``."""
        if self.weight.dim() == 3:
            return [range(k, k + 1) for k in heads]
        detached = self.call.detach_weight
        starts = [k for k in heads if k == heads.start or (k + 1 in detached) != (k in detached)]
        return [range(a, b) for a, b in itertools.pairwise([*starts, heads.stop])]

    def _run_range(self, heads: range, hidden: Mapping[int, Tensor], out: _ChunkGradients) -> None:
        begin, end = self.selection.offsets[heads.start], self.selection.offsets[heads.stop]
        if begin == end:
            return
        gemms = self._gemms_of(heads.start if self.weight.dim() == 3 else 0)
        vocab_size, dtype, device = gemms.weight.shape[0], gemms.logits_dtype, self.weight.device
        backend = backend_of(device)
        rounds = out.weight is not None and out.weight.dtype != self.call.acc_dtype
        size = chunk_size(
            end - begin,
            vocab_size if self.shard is None else self.shard.largest,
            dtype.itemsize,
            chunk_rows=self.call.chunk_rows,
            workspace_bytes=self.call.workspace_bytes,
            gpu_width=None if backend.sees_values else gemms.weight.shape[1],
            sum_width=gemms.weight.shape[1] if rounds else None,
        )
        logits = empty((size, backend.row_stride(vocab_size, dtype.itemsize)), dtype, device)[:, :vocab_size]
        for low in range(begin, end, size):
            self._chunk(low, min(low + size, end), logits, hidden, gemms, out)

    def _gemms_of(self, k: int) -> ChunkGemms:
        """Returns the GEMMs with head ``k``'s unembedding; the last one is cached."""
        if k not in self._gemms:
            made = ChunkGemms(
                self.weight[k] if self.weight.dim() == 3 else self.weight,
                self.call.compute_dtype,
                sharded=self.shard is not None,
            )
            self._gemms = {k: made}
        return self._gemms[k]

    def _chunk(
        self,
        low: int,
        high: int,
        logits: Tensor,
        hidden: Mapping[int, Tensor],
        gemms: ChunkGemms,
        out: _ChunkGradients,
    ) -> None:
        h = self._gather(low, high, hidden, gemms)
        z = gemms.logits(h, logits[: high - low])
        self._loss(z, self.selection.rows[low:high], write_gradient=out.needed)
        if out.needed:
            self._products(low, high, z, h, gemms, out)

    def _loss(self, z: Tensor, rows: Tensor, *, write_gradient: bool) -> None:
        arguments = (z, rows, self.call, self.terms.scales, self._tables)
        if self.shard is None:
            return loss_rows_(*arguments, write_gradient=write_gradient)
        stage = self.shard.stage(len(rows), z.device)
        loss_rows_(*arguments, write_gradient=write_gradient, stage="statistics", shard=stage)
        self.shard.combine_(stage.statistics)
        loss_rows_(*arguments, write_gradient=write_gradient, stage="gradient", shard=stage)

    def _products(self, low: int, high: int, z: Tensor, h: Tensor, gemms: ChunkGemms, out: _ChunkGradients) -> None:
        pending: torch.distributed.Work | None = None
        by = 1.0 / self.terms.gradient_scale
        if out.hidden:
            grad, in_place = self._grad_hidden(low, high, z, by, gemms, out.hidden)
            if self.shard is not None:
                pending = self.shard.sum_async_(grad)  # overlaps with the weight's GEMM below
        if out.weight is not None:
            gemms.add_grad_weight(z, h, out.weight, by, accumulate=out.accumulate)
            out.accumulate = True
        if out.bias is not None:
            gemms.add_grad_bias(z, out.bias, by)
        if out.hidden:
            if pending is not None:
                pending.wait()
            if not in_place:
                self._scatter(low, high, grad, out.hidden)

    def _gather(self, low: int, high: int, hidden: Mapping[int, Tensor], gemms: ChunkGemms) -> Tensor:
        """Gathers the chunk's rows as a GEMM operand ``[C, D]``; a view if consecutive and in the right dtype."""
        dtype, valid = gemms.logits_dtype, self.selection.valid
        buffer: Tensor | None = None
        for head, where, index in self.selection.pieces(low, high):
            source = hidden[head]
            if isinstance(index, slice) and where == slice(0, high - low) and source.dtype == dtype and valid is None:
                return source[index]
            if buffer is None:
                buffer = self._buffer("hidden", (high - low, source.shape[1]), dtype)
            picked = source[index] if isinstance(index, slice) else source.index_select(0, index)
            if valid is None:
                buffer[where].copy_(picked.to(gemms.compute_dtype))
            else:
                copy_valid_rows(picked.to(gemms.compute_dtype), valid[low:high][where], self._zero, buffer[where])
        assert buffer is not None, "a chunk has at least one row"
        return buffer

    def _grad_hidden(
        self, low: int, high: int, z: Tensor, by: float, gemms: ChunkGemms, grads: Mapping[int, Tensor]
    ) -> tuple[Tensor, bool]:
        """Computes the chunk's gradient ``[C, D]``; also returns whether it was written in place to ``grads``."""
        pieces = list(self.selection.pieces(low, high))
        head, _, index = pieces[0]
        target = grads[head]
        if len(pieces) == 1 and isinstance(index, slice) and target.dtype == gemms.product_dtype:
            return gemms.grad_hidden(z, target[index], by), True
        buffer = self._buffer("grad_hidden", (high - low, gemms.weight.shape[1]), gemms.product_dtype)
        return gemms.grad_hidden(z, buffer, by), False

    def _scatter(self, low: int, high: int, grad: Tensor, grads: Mapping[int, Tensor]) -> None:
        for head, where, index in self.selection.pieces(low, high):
            target = grads[head]
            if isinstance(index, slice):
                target[index] = grad[where].to(target.dtype)
            else:
                target.index_copy_(0, index, grad[where].to(target.dtype))

    def _buffer(self, name: str, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """Returns a buffer that the chunks share, grown if a later range has larger chunks."""
        held = self._buffers.get(name)
        if held is None or held.shape[0] < shape[0] or held.dtype != dtype or held.shape[1] != shape[1]:
            held = empty(shape, dtype, self.weight.device)
            self._buffers[name] = held
        return held[: shape[0]]
