"""The loss of one step over n heads, fed one head at a time (the paper's sequential order) or all at once.

This is what the public functions and the training schedules stand on. It works below autograd: it takes values, and
returns gradients.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from mtp_ext.ops.common import metrics
from mtp_ext.ops.common.checks import check_max_valid, check_targets_in_range
from mtp_ext.ops.common.result import MultiTokenLoss
from mtp_ext.ops.common.workspace import empty
from mtp_ext.ops.loss.chunk_gemms import ChunkGemms
from mtp_ext.ops.loss.device_rows import constants, counts_stay_on, float16_scale
from mtp_ext.ops.loss.row_kernels import RowOptions, RowTables, RowTargets, select_rows
from mtp_ext.ops.loss.row_loop import Gradients, RowLoop
from mtp_ext.ops.loss.row_selection import RowSelection, most_rows
from mtp_ext.ops.loss.vocabulary_shard import VocabularyShard


class HeadLossAccumulator:
    """Loss, metrics and gradients of ``n`` heads over one unembedding, without ever holding the logits.

    Heads are given in any order, each once, by :meth:`add`, or all together by :meth:`add_all` (then chunks run over
    the joint rows of all heads). No argument may require grad; nothing here is recorded by autograd.

    Args:
        labels: ``[B, S']`` int32 or int64, unshifted: head ``k`` (1-based) at position ``s`` predicts
            ``labels[:, s + first_shift + k - 1]``.
        weight: ``[V, D]`` shared, or ``[n, V, D]`` replicated.
        seq_len: ``S``, the positions of a head.
        n_heads: ``n``.
        first_shift: Shift of head 1: 1 for the next token.
        document_ids: ``[B, S']`` integers: a target counts only in the document of its position.
        head_weights: ``[n]``, weight of each head's loss; default 1.
        token_weights: ``[B, S']`` float32, the weight of ``labels[b, j]`` as a target; "per_head" then divides by the
            sum of weights.
        normalizer: ``"per_head"``: each head's loss is its weighted mean over its own valid targets. Else the number
            (or 0-d tensor) that each head's sum is divided by.
        bias, class_weights: ``[V]``.
        ignore_index: The label without loss or gradient.
        options: Smoothing, z-loss, cap and scale.
        need_grad_hidden, need_grad_weight, need_grad_bias: Which gradients to form.
        detach_weight: 1-based heads whose loss sends no gradient to ``weight``.
        compute_dtype: What hidden states and weight are rounded to before they are multiplied; default their own.
        row_scale, lse_grad: ``[n * B * S]``, an incoming gradient per flat row, of its loss and of its log-sum-exp.
        grad_weight_out: Buffer of ``weight``'s shape, float32, that the weight's gradient is added to.
        group: Process group over which the vocabulary is sharded: ``weight``, ``bias`` and ``class_weights`` hold this
            rank's classes (in rank order), everything else is the same on every rank.
        chunk_rows, workspace_bytes: See :func:`mtp_ext.ops.loss.chunk_gemms.chunk_size`.
        max_valid: The most targets that count, of each head; with more, a head's loss and gradients are NaN.

    Raises:
        ValueError: On the CPU, a target outside ``[0, V)`` that is not ``ignore_index``, or more than ``max_valid``.
    """

    def __init__(
        self,
        labels: Tensor,
        weight: Tensor,
        *,
        seq_len: int,
        n_heads: int,
        first_shift: int = 1,
        document_ids: Tensor | None = None,
        head_weights: Tensor | Sequence[float] | None = None,
        token_weights: Tensor | None = None,
        normalizer: str | float | Tensor = "per_head",
        bias: Tensor | None = None,
        class_weights: Tensor | None = None,
        ignore_index: int = -100,
        options: RowOptions | None = None,
        need_grad_hidden: bool = True,
        need_grad_weight: bool = True,
        need_grad_bias: bool = False,
        detach_weight: Collection[int] = (),
        compute_dtype: torch.dtype | None = None,
        row_scale: Tensor | None = None,
        lse_grad: Tensor | None = None,
        grad_weight_out: Tensor | None = None,
        chunk_rows: int | None = None,
        workspace_bytes: int | None = None,
        max_valid: Sequence[int] | None = None,
        group: torch.distributed.ProcessGroup | None = None,
    ) -> None:
        self.n_heads, self.seq_len, self.first_shift = n_heads, seq_len, first_shift
        self.weight = weight.detach()
        self.compute_dtype = compute_dtype or weight.dtype
        self.acc_dtype = torch.float64 if self.compute_dtype == torch.float64 else torch.float32
        self.need_grad_hidden = need_grad_hidden
        self.detached = frozenset(detach_weight)
        targets = RowTargets.of(labels, document_ids, token_weights, seq_len, first_shift)
        self.labels = targets.labels
        self.shard = None if group is None else VocabularyShard.of(weight, group)
        vocab_size = weight.shape[-2] if self.shard is None else self.shard.total
        rows, self.n_valid, first_invalid = select_rows(
            targets, n_heads, ignore_index=ignore_index, vocab_size=vocab_size
        )
        check_targets_in_range(self.labels, first_invalid, vocab_size, ignore_index)
        check_max_valid(self.n_valid, max_valid)
        self._excess = _nan_in_excess(self.n_valid, max_valid, self.acc_dtype)
        limits = most_rows(targets, n_heads, max_valid)
        selection = RowSelection.of(rows, self.n_valid, targets.rows_per_head, limits)

        self.head_weights = self._as_head_weights(head_weights)
        self.class_weights = None if class_weights is None else class_weights.detach().float().contiguous()
        self._row_weights = self._weights_of_rows(targets, selection)
        self.denominator = self._denominators(normalizer, selection)
        # Behind a denominator of 0 are no rows, or rows of weight 0: their sum is 0, whatever it is divided by.
        self._divisor = self.denominator.where(self.denominator != 0, 1)
        self.head_scale = self.head_weights / self._divisor
        if self._excess is not None:
            self.head_scale = self.head_scale + self._excess
        # An incoming gradient per row brings its own scale; a shard's logits are float32.
        is_mean = isinstance(normalizer, str) and row_scale is None and lse_grad is None and self.shard is None
        in_float16 = is_mean and self.compute_dtype == torch.float16 and weight.is_cuda
        self._gradient_scale = float16_scale(targets.rows_per_head) if in_float16 else 1.0
        self.loop = RowLoop(
            targets,
            selection,
            options or RowOptions(),
            self.head_scale * self._gradient_scale,
            RowTables.zeros(n_heads * targets.rows_per_head, self.acc_dtype, labels.device),
            class_weights=self.class_weights,
            **self._class_weight_sum(vocab_size),
            bias=None if bias is None else bias.detach().to(self.acc_dtype).contiguous(),
            row_scale=None if row_scale is None else row_scale.to(self.acc_dtype).contiguous(),
            lse_grad=None if lse_grad is None else lse_grad.to(self.acc_dtype).contiguous(),
            shard=self.shard,
            chunk_rows=chunk_rows,
            workspace_bytes=workspace_bytes,
        )
        self._grad_weight = grad_weight_out
        self._grad_weight_is_empty = False
        if need_grad_weight and grad_weight_out is None:
            self._grad_weight_is_empty = weight.dim() == 2
            self._grad_weight = empty(weight.shape, self.acc_dtype, weight.device)
            if not self._grad_weight_is_empty:
                self._grad_weight.zero_()
        self.grad_bias = (
            torch.zeros(weight.shape[-2], dtype=self.acc_dtype, device=weight.device) if need_grad_bias else None
        )
        self._shared_gemms: ChunkGemms | None = None

    def add(self, head: int, hidden: Tensor) -> Tensor | None:
        """Adds head ``head`` (1-based).

        Args:
            head: Which head, ``1..n``.
            hidden: ``[B, S, D]``.
        Returns:
            The gradient of ``sum_k head_weights[k] * head_loss[k]`` in ``hidden``, ``[B, S, D]``, or None.
        """
        grad = self._empty_grad(hidden, hidden.dtype)
        self._run(range(head - 1, head), {head - 1: hidden}, {head - 1: grad})
        return grad

    def add_all(
        self, hidden: Sequence[Tensor] | Tensor, *, grad_dtype: torch.dtype | None = None
    ) -> list[Tensor | None] | Tensor | None:
        """Adds all heads; the joint rows share chunks.

        Args:
            hidden: ``n`` tensors ``[B, S, D]``, or one ``[n, B, S, D]``.
            grad_dtype: That of the gradients; default ``hidden``'s.
        Returns:
            Their gradients in the same form; None where they are not wanted.
        """
        dtype = grad_dtype or hidden[0].dtype
        grads: list[Tensor | None] | Tensor | None
        if isinstance(hidden, Tensor):
            grads = self._empty_grad(hidden, dtype)
        else:
            grads = [self._empty_grad(h, dtype) for h in hidden]
        for heads in self._ranges_of_equal_weight():
            self._run(heads, {k: hidden[k] for k in heads}, {k: None if grads is None else grads[k] for k in heads})
        return grads

    def result(self, *, with_metrics: bool = True) -> MultiTokenLoss:
        """The loss and the metrics of the heads added so far (a head not added counts as 0).

        Args:
            with_metrics: Without, top-1 and accept length are empty.
        """
        sums = self.row_losses().view(self.n_heads, -1).sum(1, dtype=torch.float64)
        head_loss = sums / self._divisor
        loss = (head_loss * self.head_weights.double()).sum().to(self.acc_dtype)
        top1, accept_length = torch.empty(0, device=sums.device), torch.empty(0, device=sums.device)
        if with_metrics:
            predicted = self.loop.tables.predicted.view(self.n_heads, self.labels.shape[0], self.seq_len)
            top1 = metrics.top1(
                predicted, self.labels, self.n_valid, seq_len=self.seq_len, first_shift=self.first_shift
            )
            accept_length = metrics.acceptance_length(predicted)
        return MultiTokenLoss(loss, head_loss.to(self.acc_dtype), self.n_valid, top1, accept_length)

    def row_losses(self) -> Tensor:
        """``[n * B * S]``: each flat row's loss times its token weight; 0 at rows that do not count."""
        loss = self.loop.tables.loss
        if self._excess is not None:
            loss = (loss.view(self.n_heads, -1) + self._excess[:, None]).flatten()
        return loss if self._row_weights is None else loss * self._row_weights

    @property
    def grad_weight(self) -> Tensor | None:
        """``weight``'s gradient from the heads added so far, its shape, float32 (float64 for float64 inputs)."""
        if self._grad_weight is not None and self._grad_weight_is_empty:
            self._grad_weight.zero_()
            self._grad_weight_is_empty = False
        return self._grad_weight

    def _run(self, heads: range, hidden: dict[int, Tensor], grads: dict[int, Tensor | None]) -> None:
        """Adds ``heads`` and writes their gradients, each ``[B, S, D]``."""
        offsets = self.loop.selection.offsets
        flat: list[Tensor | None] = [None] * self.n_heads
        flat_grads: list[Tensor | None] = [None] * self.n_heads
        for k in heads:
            flat[k] = hidden[k].detach().reshape(-1, hidden[k].shape[-1])
            grad = grads[k]
            if grad is not None:
                full = offsets[k + 1] - offsets[k] == self.loop.selection.rows_per_head
                flat_grads[k] = (grad if full else grad.zero_()).view(-1, grad.shape[-1])
        out: Gradients | None = None
        grad_weight = None if heads.start + 1 in self.detached else self._grad_weight_of(heads.start)
        if self.need_grad_hidden or grad_weight is not None or self.grad_bias is not None:
            out = Gradients(flat_grads, grad_weight, self._grad_weight_is_empty, self.grad_bias)
        self.loop.run(offsets[heads.start], offsets[heads.stop], flat, self._gemms_of(heads.start), out)
        if out is not None and grad_weight is not None:
            self._grad_weight_is_empty = out.weight_is_empty

    def _empty_grad(self, hidden: Tensor, dtype: torch.dtype) -> Tensor | None:
        return empty(hidden.shape, dtype, hidden.device) if self.need_grad_hidden else None

    def _ranges_of_equal_weight(self) -> list[range]:
        """Runs of heads whose rows may share a chunk: one unembedding, and the same answer to detach_weight."""
        if self.weight.dim() == 3:
            return [range(k, k + 1) for k in range(self.n_heads)]
        starts = [k for k in range(self.n_heads) if k == 0 or (k + 1 in self.detached) != (k in self.detached)]
        return [range(a, b) for a, b in zip(starts, [*starts[1:], self.n_heads], strict=True)]

    def _gemms(self, weight: Tensor) -> ChunkGemms:
        return ChunkGemms(
            weight,
            self.compute_dtype,
            full_precision_logits=self.shard is not None,
            gradient_unscale=1.0 / self._gradient_scale,
        )

    def _gemms_of(self, head: int) -> ChunkGemms:
        if self.weight.dim() == 3:
            return self._gemms(self.weight[head])
        if self._shared_gemms is None:
            self._shared_gemms = self._gemms(self.weight)
        return self._shared_gemms

    def _grad_weight_of(self, head: int) -> Tensor | None:
        if self._grad_weight is None or self.weight.dim() == 2:
            return self._grad_weight
        return self._grad_weight[head]

    def _as_head_weights(self, head_weights: Tensor | Sequence[float] | None) -> Tensor:
        device = self.labels.device
        if head_weights is None:
            return torch.ones(self.n_heads, dtype=self.acc_dtype, device=device)
        if isinstance(head_weights, Tensor):
            return head_weights.detach().to(device=device, dtype=self.acc_dtype)
        return constants(list(head_weights), self.acc_dtype, device)

    def _weights_of_rows(self, targets: RowTargets, selection: RowSelection) -> Tensor | None:
        """``[n * B * S]`` token weights (0 at rows that do not count), or None where all are 1."""
        if targets.token_weights is None:
            return None
        at_targets = self._at_targets(targets.token_weights, selection).to(self.acc_dtype)
        if selection.valid is not None:
            at_targets = torch.where(selection.valid, at_targets, 0)
        weights = torch.zeros(self.n_heads * targets.rows_per_head, dtype=self.acc_dtype, device=self.labels.device)
        return weights.index_copy_(0, selection.flat, at_targets)

    def _at_targets(self, table: Tensor, selection: RowSelection) -> Tensor:
        """``table [B, S']`` at the target of each selected row; anything where a marked row has none."""
        rows = selection.flat
        head = rows.div(selection.rows_per_head, rounding_mode="floor")
        in_head = rows - head * selection.rows_per_head
        b = in_head.div(self.seq_len, rounding_mode="floor")
        column = in_head - b * self.seq_len + self.first_shift + head
        return table[b, column.clamp(max=table.shape[1] - 1)]

    def _class_weight_sum(self, vocab_size: int) -> dict[str, Any]:
        """The sum of the class weights, as the row loop's argument."""
        if self.class_weights is None:
            return {"class_weight_sum": float(vocab_size)}
        total = self.class_weights.double().sum()
        total = total if self.shard is None else self.shard.sum_(total)
        if counts_stay_on(total.device):
            return {"class_weight_total": total.float().reshape(1)}
        return {"class_weight_sum": float(total)}

    def _class_weights_of(self, targets: Tensor) -> Tensor:
        """``class_weights[targets]``, wherever the class is held."""
        assert self.class_weights is not None
        if self.shard is None:
            # On a GPU a target may be no class: its loss is NaN, whatever weight it is given.
            return self.class_weights[targets.clamp(0, self.class_weights.shape[0] - 1)]
        local = targets - self.shard.start
        held = (local >= 0) & (local < self.shard.size)
        padded = torch.cat([self.class_weights, self.class_weights.new_zeros(1)])  # a last entry for other shards'
        return self.shard.sum_(padded[local.where(held, self.shard.size)])

    def _denominators(self, normalizer: str | float | Tensor, selection: RowSelection) -> Tensor:
        """``[n]``: what each head's sum is divided by."""
        if isinstance(normalizer, Tensor):
            return normalizer.detach().to(device=self.labels.device, dtype=self.acc_dtype).expand(self.n_heads)
        if not isinstance(normalizer, str):
            return torch.full((self.n_heads,), float(normalizer), dtype=self.acc_dtype, device=self.labels.device)
        if self._row_weights is None and self.class_weights is None:
            return self.n_valid.to(self.acc_dtype)
        if self._row_weights is not None:
            weights = self._row_weights[selection.flat]
        elif selection.valid is not None:
            weights = selection.valid.to(self.acc_dtype)
        else:
            weights = torch.ones(len(selection.rows), dtype=self.acc_dtype, device=self.labels.device)
        if self.class_weights is not None:
            weights = weights * self._class_weights_of(self._at_targets(self.labels, selection).long())
        return selection.sums_of_heads(weights).to(self.acc_dtype)


def _nan_in_excess(n_valid: Tensor, max_valid: Sequence[int] | None, dtype: torch.dtype) -> Tensor | None:
    """``[n]``: NaN for a head that has more targets than it was said to, else 0; None if nothing was said."""
    if max_valid is None:
        return None
    excess = n_valid > constants(max_valid, torch.int64, n_valid.device)
    return torch.zeros(len(max_valid), dtype=dtype, device=n_valid.device).masked_fill_(excess, float("nan"))
