"""The row-chunk loop: logits of a few rows, their loss, their gradient in place, and the products with it.

Every GEMM of the loss is here, three per chunk (6 N D V FLOP in all). Nothing of size ``N x V`` is ever held.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from mtp_ext.ops.common.workspace import empty, workspace
from mtp_ext.ops.loss.chunk_gemms import ChunkGemms, chunk_size
from mtp_ext.ops.loss.device_rows import add_column_sum, copy_valid_rows, counts_stay_on, padded_columns
from mtp_ext.ops.loss.row_kernels import RowOptions, RowTables, RowTargets, loss_rows_
from mtp_ext.ops.loss.row_selection import RowSelection
from mtp_ext.ops.loss.vocabulary_shard import VocabularyShard


@dataclass
class Gradients:
    """Where the loop writes gradients; None where none is needed."""

    hidden: Sequence[Tensor | None]  # n times [B * S, D], zeros at rows that do not count
    weight: Tensor | None = None  # [V, D] float32 or float64
    weight_is_empty: bool = False  # weight is uninitialised: the first chunk writes it instead of adding
    bias: Tensor | None = None  # [V], zeros or a running sum


@dataclass
class RowLoop:
    """One loss over selected rows; ``run`` may be called for any range of them, in any order."""

    targets: RowTargets
    selection: RowSelection
    options: RowOptions
    head_scale: Tensor  # [n], the gradient weight of each head's rows
    tables: RowTables
    class_weights: Tensor | None = None
    class_weight_sum: float = 0.0
    class_weight_total: Tensor | None = None  # [1] float32, in place of class_weight_sum where no host may wait
    bias: Tensor | None = None
    row_scale: Tensor | None = None  # [n * B * S], incoming gradient per row
    lse_grad: Tensor | None = None
    shard: VocabularyShard | None = None
    chunk_rows: int | None = None
    workspace_bytes: int | None = None
    _buffers: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def run(
        self, begin: int, end: int, hidden: Sequence[Tensor | None], gemms: ChunkGemms, out: Gradients | None
    ) -> None:
        """Processes ``selection.rows[begin:end]``.

        Args:
            begin, end: Range of selected rows.
            hidden: Per head ``[B * S, D]`` (None for heads outside the range).
            gemms: The unembedding of these rows.
            out: Gradients to write, or None for the loss alone.
        """
        if begin == end:
            return
        vocab_size, dtype = gemms.weight.shape[0], gemms.logits_dtype
        size = chunk_size(
            end - begin,
            vocab_size if self.shard is None else self.shard.largest,
            dtype.itemsize,
            chunk_rows=self.chunk_rows,
            workspace_bytes=self.workspace_bytes,
            gpu_width=gemms.weight.shape[1] if counts_stay_on(gemms.weight.device) else None,
        )
        columns = padded_columns(vocab_size, dtype.itemsize, self.targets.labels.device)
        with workspace((size, columns), dtype, self.targets.labels.device) as logits:
            for low in range(begin, end, size):
                self._chunk(low, min(low + size, end), logits[:, :vocab_size], hidden, gemms, out)

    def _chunk(
        self,
        low: int,
        high: int,
        logits: Tensor,
        hidden: Sequence[Tensor | None],
        gemms: ChunkGemms,
        out: Gradients | None,
    ) -> None:
        rows = self.selection.rows[low:high]
        h = self._gather(low, high, hidden, gemms)
        z = gemms.logits(h, logits[: high - low])
        self._loss(z, rows, write_gradient=out is not None)
        if out is not None:
            self._products(low, high, z, h, gemms, out)

    def _loss(self, z: Tensor, rows: Tensor, *, write_gradient: bool) -> None:
        row_pass = partial(
            loss_rows_,
            z,
            rows,
            self.targets,
            self.tables,
            head_scale=self.head_scale,
            options=self.options,
            row_scale=self.row_scale,
            lse_grad=self.lse_grad,
            class_weights=self.class_weights,
            class_weight_sum=self.class_weight_sum,
            class_weight_total=self.class_weight_total,
            bias=self.bias,
            write_gradient=write_gradient,
        )
        if self.shard is None:
            row_pass()
            return
        stage = self.shard.stage(len(rows), z.device)
        row_pass(stage="statistics", shard=stage)
        self.shard.combine_(stage.statistics)
        row_pass(stage="gradient", shard=stage)

    def _products(self, low: int, high: int, z: Tensor, h: Tensor, gemms: ChunkGemms, out: Gradients) -> None:
        need_hidden = any(g is not None for g in out.hidden)
        pending: torch.distributed.Work | None = None
        if need_hidden:
            grad, in_place = self._grad_hidden(low, high, z, gemms, out.hidden)
            if self.shard is not None:
                pending = self.shard.sum_async_(grad)  # overlaps with the weight's product below
        if out.weight is not None:
            gemms.add_grad_weight(z, h, out.weight, accumulate=not out.weight_is_empty)
            out.weight_is_empty = False
        if out.bias is not None:
            add_column_sum(z, out.bias, gemms.gradient_unscale)
        if need_hidden:
            if pending is not None:
                pending.wait()
            if not in_place:
                self._scatter(low, high, grad, out.hidden)

    def _gather(self, low: int, high: int, hidden: Sequence[Tensor | None], gemms: ChunkGemms) -> Tensor:
        """The chunk's rows as a GEMM operand ``[C, D]``; a view where they are consecutive and need no conversion."""
        dtype = gemms.logits_dtype
        buffer: Tensor | None = None
        for head, where, index in self.selection.pieces(low, high):
            source = hidden[head]
            assert source is not None, "a head in the range has no hidden rows"
            valid = self.selection.valid
            if isinstance(index, slice) and where == slice(0, high - low) and source.dtype == dtype and valid is None:
                return source[index]
            if buffer is None:
                buffer = self._buffer("hidden", (high - low, source.shape[1]), dtype)
            picked = source[index] if isinstance(index, slice) else source.index_select(0, index)
            if valid is None:
                buffer[where].copy_(picked.to(gemms.compute_dtype))
            else:
                copy_valid_rows(picked.to(gemms.compute_dtype), valid[low:high][where], buffer[where])
        assert buffer is not None, "a chunk has at least one row"
        return buffer

    def _grad_hidden(
        self, low: int, high: int, z: Tensor, gemms: ChunkGemms, grads: Sequence[Tensor | None]
    ) -> tuple[Tensor, bool]:
        """The chunk's gradient ``[C, D]``, and whether it was written straight to where it belongs."""
        pieces = list(self.selection.pieces(low, high))
        head, _, index = pieces[0]
        target = grads[head]
        if len(pieces) == 1 and target is not None and isinstance(index, slice) and target.dtype == gemms.product_dtype:
            return gemms.grad_hidden(z, target[index]), True
        buffer = self._buffer("grad_hidden", (high - low, gemms.weight.shape[1]), gemms.product_dtype)
        return gemms.grad_hidden(z, buffer), False

    def _scatter(self, low: int, high: int, grad: Tensor, grads: Sequence[Tensor | None]) -> None:
        for head, where, index in self.selection.pieces(low, high):
            target = grads[head]
            if target is None:
                continue
            if isinstance(index, slice):
                target[index] = grad[where].to(target.dtype)
            else:
                target.index_copy_(0, index, grad[where].to(target.dtype))

    def _buffer(self, name: str, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """Memory that the chunks share; grown where a later range has larger chunks."""
        held = self._buffers.get(name)
        if held is None or held.shape[0] < shape[0] or held.dtype != dtype or held.shape[1] != shape[1]:
            held = empty(shape, dtype, self.targets.labels.device)
            self._buffers[name] = held
        return held[: shape[0]]
