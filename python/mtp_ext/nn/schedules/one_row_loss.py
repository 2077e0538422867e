"""The loss of heads with the same output: ``n`` targets on one row of logits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from mtp_ext.ops import reference
from mtp_ext.ops.common.backend import backend_of
from mtp_ext.ops.common.checks import check_max_valid, check_targets_in_range
from mtp_ext.ops.common.result import MultiTokenLoss, RowTables, head_metrics
from mtp_ext.ops.loss.accumulator import HeadLossAccumulator
from mtp_ext.ops.loss.arguments import LossCall, Needs
from mtp_ext.ops.loss.loop.head_terms import head_weights, plain_divisors
from mtp_ext.ops.loss.options import RowOptions
from mtp_ext.ops.loss.row_kernels import prepared, select_rows


class OneRowLoss:
    """``n`` targets on one row of logits: one product with the unembedding instead of ``n``.

    The loss is ``sum_k a_k (lse - z[target_k])`` with ``a_k`` the weight of head ``k``'s target. The log-sum-exp and
    its gradient ``(sum_k a_k) softmax`` come from the fused loss; the targets' logits are ``n`` dot products per row.

    Args:
        call: The call of all heads, for which :meth:`takes` must be True.
        weight: ``[V, D]``.
        needs: Which gradients to compute.
        active: The heads whose targets count.
    """

    def __init__(self, call: LossCall, weight: Tensor, needs: Needs, active: frozenset[int]) -> None:
        self.heads = frozenset({min(active)})
        self._call, self._active, self._weight = call, active, weight.detach()
        selected = select_rows(prepared(call), weight.shape[0])
        check_targets_in_range(call.labels, selected.first_invalid, weight.shape[0], call.ignore_index)
        check_max_valid(selected.counts, call.max_valid)
        self._n_valid = selected.counts
        heads, device = range(1, call.n_heads + 1), call.labels.device
        every = [
            reference.shifted_targets(call.labels, k, call.seq_len, call.document_ids, call.ignore_index) for k in heads
        ]
        self._targets = torch.stack(every).long()  # [n, B, S]
        self._divisors = plain_divisors(call, self._n_valid)
        ran = backend_of(device).constants([k in active for k in heads], torch.bool, device)
        self._counts = (self._targets != call.ignore_index) & ran[:, None, None]
        self._scale = (head_weights(call) / self._divisors)[:, None, None] * self._counts  # [n, B, S], a_k
        self._head_loss = torch.zeros(call.n_heads, dtype=call.acc_dtype, device=device)
        self._accumulator = HeadLossAccumulator(self._of_lse(), self._weight, needs)

    @staticmethod
    def takes(call: LossCall) -> bool:
        """Returns True if each target's loss is ``lse - z[target]`` of (capped) logits, without token weights.

        False for float16 logits: incoming gradients of the log-sum-exp as small as ``1 / n_valid`` would underflow.
        """
        plain = call.options == RowOptions(softcap=call.options.softcap)
        in_float16 = backend_of(call.labels.device).logits_dtype(call.compute_dtype) == torch.float16
        return plain and call.token_weights is None and call.bias is None and not in_float16

    def _of_lse(self) -> LossCall:
        """Returns a call with loss 0 and incoming gradient ``sum_k a_k`` of the log-sum-exp."""
        call = self._call
        weights = torch.zeros(1, dtype=call.acc_dtype, device=call.labels.device)
        return replace(
            call,
            labels=self._any_target(),
            n_heads=1,
            document_ids=None,
            head_weights=weights,
            normalizer=1.0,
            max_valid=None,
            lse_grad=self._scale.sum(0).flatten(),
        )

    def _any_target(self) -> Tensor:
        """Returns labels ``[B, S + 1]`` with each row's first target, or ``ignore_index``."""
        ignored = self._call.ignore_index
        first = self._counts.to(torch.int8).argmax(0, keepdim=True)
        some = self._targets.gather(0, first)[0].where(self._counts.any(0), ignored)
        return torch.cat([torch.full_like(some[:, :1], ignored), some], dim=1)

    @property
    def grad_weight(self) -> Tensor | None:
        return self._accumulator.grad_weight

    @property
    def grad_bias(self) -> Tensor | None:
        return None

    def add(self, hidden: Mapping[int, Tensor]) -> dict[int, Tensor | None]:
        """Adds the one output of all heads."""
        ((head, rows),) = hidden.items()
        rows = rows.detach()
        grad = self._accumulator.add({1: rows})[1]
        lse = self._accumulator.row_tables().lse[0]
        rows = rows.to(self._call.compute_dtype).to(lse.dtype)
        for k in sorted(self._active):
            self._add_target(k, rows, lse, grad)
        return {head: grad}

    def _add_target(self, k: int, rows: Tensor, lse: Tensor, grad: Tensor | None) -> None:
        """Adds the logits of head ``k``'s targets to its loss and to the gradients.

        Args:
            rows: ``[B, S, D]``, rounded to the compute dtype.
            lse: ``[B, S]``.
            grad: ``[B, S, D]``, the gradient of ``rows``.
        """
        counts, weight, softcap = self._counts[k - 1], self._weight, self._call.options.softcap
        wanted = self._targets[k - 1].where(counts, 0)
        index = wanted.clamp(0, len(weight) - 1)
        vectors = weight[index].to(self._call.compute_dtype).to(lse.dtype)  # [B, S, D]
        # On a GPU targets are not validated; one outside [0, V) makes the loss NaN.
        logits = (rows * vectors).sum(-1).where(wanted == index, float("nan"))
        slope = -self._scale[k - 1]
        if softcap is not None:
            capped = torch.tanh(logits / softcap)
            logits, slope = softcap * capped, slope * (1 - capped * capped)
        # where, not a product: non-finite values in a row without a target must not count.
        self._head_loss[k - 1] = (lse - logits).where(counts, 0).sum() / self._divisors[k - 1]
        slope = slope.where(counts, 0)[..., None]
        if grad is not None:
            grad.add_((vectors * slope).where(counts[..., None], 0).to(grad.dtype))
        grad_weight = self.grad_weight
        if grad_weight is not None:
            terms = (rows * slope).where(counts[..., None], 0)
            grad_weight.index_add_(0, index.flatten(), terms.flatten(0, 1).to(grad_weight.dtype))

    def result(self) -> MultiTokenLoss:
        """Returns loss and metrics, once the output has been added."""
        call = self._call
        found = (table.expand(call.n_heads, -1, -1) for table in self._accumulator.row_tables())
        none = RowTables.zeros(call.n_heads, *call.row_shape, dtype=call.acc_dtype, device=call.labels.device)
        tables = RowTables._make(x.where(self._counts, y) for x, y in zip(found, none, strict=True))
        loss = (self._head_loss.double() * head_weights(call).double()).sum().to(call.acc_dtype)
        measured = head_metrics(tables, call.labels, self._n_valid, call.first_shift, self._active)
        return MultiTokenLoss(loss=loss, head_loss=self._head_loss, n_valid=self._n_valid, **measured)
