"""Accumulates the loss of one step over n heads, one head at a time (the paper's sequential order) or several at once.

Used by the training schedules, and by the public functions outside their fast path. It works below autograd: values go
in, gradients come out. On the CPU the heads run in the native call (:mod:`mtp_ext.ops.loss.native_cpu`); on a GPU, and
with a sharded vocabulary, in the row-chunk loop (:mod:`mtp_ext.ops.loss.loop.row_loop`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mtp_ext.ops.common.backend import backend_of
from mtp_ext.ops.common.result import MultiTokenLoss, RowTables, empty_metrics, head_metrics
from mtp_ext.ops.loss.arguments import LossCall, Needs, WeightSums
from mtp_ext.ops.loss.loop.head_terms import head_weights
from mtp_ext.ops.loss.loop.row_loop import RowLoop
from mtp_ext.ops.loss.native_cpu import NativeHeads


def runs_natively(call: LossCall, weight: Tensor) -> bool:
    """Returns True if the heads run in the native call."""
    return backend_of(weight.device).native_loss and call.group is None


class HeadLossAccumulator:
    """Computes loss, metrics and gradients of ``n`` heads over one unembedding without storing the logits.

    Heads are added with :meth:`add`, each once, in any order, or with :meth:`add_all`. Autograd records nothing here.

    Args:
        call: The arguments of the loss.
        weight: ``[V, D]`` shared, or ``[n, V, D]`` replicated.
        needs: Which gradients to compute.
        heads: The heads that will be added, ``1..n``; default all. The accept length covers the leading ones.
        sums: Buffers for the gradients of weight and bias; default new ones in the accumulation dtype.
    Raises:
        ValueError: On the CPU, a target outside ``[0, V)`` that is not ``ignore_index``, or more than ``max_valid``.
    """

    def __init__(
        self,
        call: LossCall,
        weight: Tensor,
        needs: Needs,
        heads: frozenset[int] | None = None,
        sums: WeightSums | None = None,
    ) -> None:
        self.call, self._replicated = call, weight.dim() == 3
        self.heads = frozenset(range(1, call.n_heads + 1)) if heads is None else heads
        self._heads = (NativeHeads if runs_natively(call, weight) else RowLoop)(call, weight, needs)
        self._sums = WeightSums.of(call, weight, needs) if sums is None else sums
        # Heads of a replicated weight whose gradient holds nothing yet.
        self._unwritten = set() if self._sums.accumulate else set(range(call.n_heads))

    def add(self, hidden: Mapping[int, Tensor]) -> dict[int, Tensor | None]:
        """Adds heads; heads added together share chunks.

        Args:
            hidden: By head, ``1..n``: ``[B, S, D]``.
        Returns:
            By head, the gradient of ``sum_k head_weights[k] * head_loss[k]`` with respect to ``hidden``,
            ``[B, S, D]``; None if not needed.
        """
        grads: dict[int, Tensor | None] = dict.fromkeys(hidden)
        for heads in _alike(hidden):
            found = self._run(heads, [hidden[k + 1] for k in heads])
            grads.update(zip((k + 1 for k in heads), found, strict=False))
        return grads

    def add_all(self, hidden: Sequence[Tensor]) -> Sequence[Tensor | None]:
        """Adds all heads, as ``n`` tensors ``[B, S, D]`` or one ``[n, B, S, D]``; returns the gradients likewise."""
        return self._run(range(self.call.n_heads), hidden)

    def row_tables(self) -> RowTables:
        """Returns the tables of the heads added so far, ``[n, B, S]``; losses include their token weights."""
        return self._heads.row_tables()

    @property
    def divisors(self) -> Tensor:
        """The divisor of each head's sum, ``[n]``."""
        return self._heads.divisors

    def result(self) -> MultiTokenLoss:
        """Returns loss and metrics of the heads added so far (a head not added counts as 0)."""
        call, n_valid, tables = self.call, self._heads.n_valid, self.row_tables()
        head_loss = tables.loss.sum((1, 2), dtype=torch.float64) / self.divisors
        loss = (head_loss * head_weights(call).double()).sum()
        measured = empty_metrics(loss, None)
        if call.with_metrics:
            measured = head_metrics(tables, call.labels, n_valid, call.first_shift, self.heads)
        return MultiTokenLoss(
            loss=loss.to(call.acc_dtype), head_loss=head_loss.to(call.acc_dtype), n_valid=n_valid, **measured
        )

    @property
    def grad_weight(self) -> Tensor | None:
        """The gradient of ``weight`` from the heads added so far, float32 (float64 for float64 inputs) or, from one
        chunk, in ``weight``'s dtype."""
        grad = self._sums.weight
        if grad is not None and grad.dim() == 3:
            for k in self._unwritten:
                grad[k].zero_()
        elif grad is not None and not self._sums.accumulate:
            grad.zero_()
        return self._unscaled(grad)

    @property
    def grad_bias(self) -> Tensor | None:
        """The gradient of the bias, ``[V]``, likewise."""
        return self._unscaled(self._sums.bias)

    def _unscaled(self, grad: Tensor | None) -> Tensor | None:
        factor = self._heads.gradient_unscale
        return grad if grad is None or factor is None else grad * factor

    def _run(self, heads: range, hidden: Sequence[Tensor]) -> Sequence[Tensor | None]:
        sums, replicated = self._sums, self._replicated
        if replicated and sums.weight is not None:
            sums = replace(sums, weight=sums.weight[heads.start : heads.stop])
        grads = self._heads.run(heads, hidden, sums)
        self._unwritten -= set(heads)
        self._sums.accumulate |= not replicated
        return grads


def _alike(hidden: Mapping[int, Tensor]) -> list[range]:
    """Ranges of consecutive 0-based heads with one dtype (under autocast dtypes may differ)."""
    found = list[range]()
    for k in sorted(hidden):
        last = found[-1] if found else range(0)
        if found and last.stop == k - 1 and hidden[k].dtype == hidden[k - 1].dtype:
            found[-1] = range(last.start, k)
        else:
            found.append(range(k - 1, k))
    return found
