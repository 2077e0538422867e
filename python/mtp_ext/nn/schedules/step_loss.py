"""The fused loss of one step, as the schedules feed it: a head's output goes in, its gradient comes out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from mtp_ext.nn.schedules.head_stack import HeadStack
from mtp_ext.nn.schedules.targets import Targets
from mtp_ext.ops import reference
from mtp_ext.ops.common import metrics
from mtp_ext.ops.common.autocast import autocast_dtype
from mtp_ext.ops.common.checks import check_targets_in_range
from mtp_ext.ops.common.result import MultiTokenLoss
from mtp_ext.ops.loss.accumulator import HeadLossAccumulator
from mtp_ext.ops.loss.device_rows import constants
from mtp_ext.ops.loss.row_kernels import RowOptions, RowTargets, select_rows


class StepLoss(Protocol):
    """Losses, metrics and gradients of one step; nothing here is recorded by autograd."""

    heads: frozenset[int]
    """Heads whose outputs are to be added, each once."""

    @property
    def grad_weight(self) -> Tensor | None:
        """The unembedding's gradient, in its shape; None if it was not asked for."""

    def add(self, outputs: Mapping[int, Tensor]) -> dict[int, Tensor | None]:
        """Adds normed outputs ``[B, S, D]`` by head; returns the loss's gradients in them."""

    def result(self) -> MultiTokenLoss:
        """Loss and metrics, once all heads have been added."""


def step_loss(
    heads: HeadStack,
    hidden: Tensor,
    weight: Tensor,
    targets: Targets,
    *,
    need_grad_hidden: bool,
    need_grad_weight: bool,
) -> StepLoss:
    """The loss that fits the heads.

    Args:
        heads: The heads.
        hidden: ``[B, S, D]``, for its shape, dtype and device.
        weight: ``[V, D]`` or ``[n, V, D]``.
        targets: Labels and how they count.
        need_grad_hidden, need_grad_weight: Which gradients to form.
    """
    # Heads of one row may differ in what they send where; then each has to be taken by itself.
    one_row = heads.one_row and weight.dim() == 2 and not targets.detach_heads and not targets.detach_weight
    kind = OneRowLoss if one_row and targets.active else ManyRowsLoss
    return kind(heads, hidden, weight, targets, need_grad_hidden, need_grad_weight)


class ManyRowsLoss:
    """A row of logits for every head and position; arguments as of :func:`step_loss`."""

    def __init__(
        self,
        heads: HeadStack,
        hidden: Tensor,
        weight: Tensor,
        targets: Targets,
        need_grad_hidden: bool,
        need_grad_weight: bool,
    ) -> None:
        self.heads, self._n_heads, self._seq_len = targets.active, heads.n_heads, hidden.shape[1]
        self._batch = targets.labels.shape[0]
        self._accumulator = HeadLossAccumulator(
            targets.labels,
            weight.detach(),
            seq_len=hidden.shape[1],
            n_heads=heads.n_heads,
            options=RowOptions(softcap=heads.softcap or 0.0),
            need_grad_hidden=need_grad_hidden,
            need_grad_weight=need_grad_weight,
            compute_dtype=autocast_dtype(hidden) or hidden.dtype,
            max_valid=targets.max_valid,
            **targets.of_the_loss(),
            **targets.of_the_chunks(),
        )

    @property
    def grad_weight(self) -> Tensor | None:
        """As of the protocol."""
        return self._accumulator.grad_weight

    def add(self, outputs: Mapping[int, Tensor]) -> dict[int, Tensor | None]:
        """As of the protocol. All heads at once share chunks."""
        if len(outputs) == self._n_heads:
            grads = self._accumulator.add_all([outputs[k] for k in sorted(outputs)])
            assert isinstance(grads, list), "a list of heads gives a list of gradients"
            return dict(zip(sorted(outputs), grads, strict=True))
        return {k: self._accumulator.add(k, output) for k, output in outputs.items()}

    def result(self) -> MultiTokenLoss:
        """As of the protocol."""
        predicted = self._accumulator.loop.tables.predicted.view(self._n_heads, self._batch, self._seq_len)
        return with_prefix_accept_length(self._accumulator.result(), predicted, self.heads)


class OneRowLoss:
    """``n`` targets on one row of logits: one product with the unembedding where ``n`` heads would take ``n``.

    ``sum_k a_k (lse - z[target_k])`` with ``a_k`` the weight of head ``k``'s target: the log-sum-exp with its gradient
    ``(sum_k a_k) softmax`` comes from the fused loss, the targets' logits are ``n`` products of vectors a row.
    Arguments as of :func:`step_loss`.
    """

    def __init__(
        self,
        heads: HeadStack,
        hidden: Tensor,
        weight: Tensor,
        targets: Targets,
        need_grad_hidden: bool,
        need_grad_weight: bool,
    ) -> None:
        self.heads = frozenset({min(targets.active)})
        self._active, self._n_heads, self._softcap = targets.active, heads.n_heads, heads.softcap
        self._labels, self._seq_len, self._weight = targets.labels, hidden.shape[1], weight.detach()
        self._need_grad_hidden = need_grad_hidden
        self._dtype = autocast_dtype(hidden) or hidden.dtype
        wide = torch.float64 if self._dtype == torch.float64 else torch.float32
        every = [
            reference.shifted_targets(targets.labels, k, hidden.shape[1], targets.document_ids, targets.ignore_index)
            for k in range(1, heads.n_heads + 1)
        ]
        self._targets = torch.stack(every).long()  # [n, B, S]
        self._valid = self._targets != targets.ignore_index
        self._n_valid = self._check(targets, weight.shape[0])
        self._head_weights = torch.ones(heads.n_heads, dtype=wide, device=hidden.device)
        if targets.head_weights is not None:
            self._head_weights = targets.head_weights.detach().to(wide)
        normalizer, count = targets.normalizer, self._n_valid.to(wide)
        if isinstance(normalizer, Tensor):
            count = normalizer.to(self._head_weights)
        elif not isinstance(normalizer, str):
            count = torch.full_like(count, normalizer)
        positive = count != 0  # a head without targets has loss 0
        self._denominator = count.where(positive, 1).expand(heads.n_heads)
        ran = constants([k in targets.active for k in range(1, heads.n_heads + 1)], torch.bool, hidden.device)
        self._counts = self._valid & (ran & positive)[:, None, None]
        self._scale = (self._head_weights / self._denominator)[:, None, None] * self._counts  # [n, B, S], a_k
        self._accumulator = HeadLossAccumulator(
            self._any_target(targets.ignore_index),
            self._weight,
            seq_len=hidden.shape[1],
            n_heads=1,
            head_weights=[0.0],  # of the log-sum-exp alone
            normalizer=1.0,
            ignore_index=targets.ignore_index,
            options=RowOptions(softcap=heads.softcap or 0.0),
            need_grad_hidden=need_grad_hidden,
            need_grad_weight=need_grad_weight,
            compute_dtype=self._dtype,
            lse_grad=self._scale.sum(0).flatten(),
            **targets.of_the_chunks(),
        )
        self._head_loss = torch.zeros(heads.n_heads, dtype=wide, device=hidden.device)

    def _check(self, targets: Targets, vocab_size: int) -> Tensor:
        """The number of targets of each head; raises ValueError for a label that is no class."""
        rows = RowTargets.of(targets.labels, targets.document_ids, None, self._seq_len, 1)
        ignored = targets.ignore_index
        _, n_valid, first_invalid = select_rows(rows, self._n_heads, ignore_index=ignored, vocab_size=vocab_size)
        check_targets_in_range(targets.labels, first_invalid, vocab_size, ignored)
        return n_valid

    def _any_target(self, ignore_index: int) -> Tensor:
        """``[B, S + 1]``: as labels, a row's first target, or none."""
        first = self._counts.to(torch.int8).argmax(0, keepdim=True)
        some = self._targets.gather(0, first)[0].where(self._counts.any(0), ignore_index)
        return torch.cat([torch.full_like(some[:, :1], ignore_index), some], dim=1)

    @property
    def grad_weight(self) -> Tensor | None:
        """As of the protocol."""
        return self._accumulator.grad_weight

    def add(self, outputs: Mapping[int, Tensor]) -> dict[int, Tensor | None]:
        """As of the protocol; the one output stands for all heads."""
        ((head, hidden),) = outputs.items()
        hidden = hidden.detach()
        grad = self._accumulator.add(1, hidden)
        lse = self._accumulator.loop.tables.lse.view(hidden.shape[:2])
        grad_weight = self._accumulator.grad_weight
        rows = hidden.to(self._dtype).to(lse.dtype)
        weight = self._weight
        for k in sorted(self._active):
            counts = self._counts[k - 1]
            wanted = self._targets[k - 1].where(counts, 0)
            index = wanted.clamp(0, len(weight) - 1)
            vectors = weight[index].to(self._dtype).to(lse.dtype)  # [B, S, D]
            # On a GPU nobody has looked whether a target is a class; one that is not makes the loss NaN.
            logits = (rows * vectors).sum(-1).where(wanted == index, float("nan"))
            slope = -self._scale[k - 1]
            if self._softcap is not None:
                capped = torch.tanh(logits / self._softcap)
                logits, slope = self._softcap * capped, slope * (1 - capped * capped)
            # where, not a product: what is not finite in a row without a target must not count.
            self._head_loss[k - 1] = (lse - logits).where(counts, 0).sum() / self._denominator[k - 1]
            slope = slope.where(counts, 0)[..., None]
            if grad is not None:
                grad.add_((vectors * slope).where(counts[..., None], 0).to(grad.dtype))
            if grad_weight is not None:
                terms = (rows * slope).where(counts[..., None], 0)
                grad_weight.index_add_(0, index.flatten(), terms.flatten(0, 1).to(grad_weight.dtype))
        return {head: grad}

    def result(self) -> MultiTokenLoss:
        """As of the protocol."""
        row = self._accumulator.loop.tables.predicted.view(1, self._labels.shape[0], self._seq_len)
        predicted = row.expand(self._n_heads, -1, -1).where(self._counts, -1)
        loss = (self._head_loss.double() * self._head_weights.double()).sum().to(self._head_loss.dtype)
        labels = self._labels
        top1 = metrics.top1(predicted, labels, self._n_valid, seq_len=self._seq_len, first_shift=1)
        accept = metrics.acceptance_length(predicted)
        result = MultiTokenLoss(loss, self._head_loss, self._n_valid, top1, accept)
        return with_prefix_accept_length(result, predicted, self._active)


def with_prefix_accept_length(result: MultiTokenLoss, predicted: Tensor, active: frozenset[int]) -> MultiTokenLoss:
    """``result`` with the accept length of the leading heads that ran: one head that did not would leave no position.

    Args:
        result: The loss.
        predicted: ``[n, B, S]``, each head's argmax.
        active: The heads that ran.
    """
    n_heads = len(predicted)
    leading = next((k for k in range(n_heads) if k + 1 not in active), n_heads)
    if leading in (0, n_heads):
        return result
    return result._replace(accept_length=metrics.acceptance_length(predicted[:leading]))
