"""Weights of each head's rows: divisors, token and class weights, and the ``max_valid`` guard."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mtp_ext.ops.common.backend import backend_of, can_read
from mtp_ext.ops.loss.arguments import LossCall
from mtp_ext.ops.loss.loop.row_selection import RowSelection
from mtp_ext.ops.loss.loop.vocabulary_shard import VocabularyShard
from mtp_ext.ops.loss.row_kernels import RowScales

LARGEST_FLOAT16_SCALE = 4096.0
SMALLEST_ROW_WEIGHT = 2.0**-100  # a float32 whose inverse is one, too


@dataclass(frozen=True)
class HeadTerms:
    """The weights of a call's rows; sums and scales have the call's ``acc_dtype``."""

    divisors: Tensor  # [n], of each head's sum
    row_weights: Tensor | None  # [n * B * S], token weights, 0 at rows without a target; None: all 1
    excess: Tensor | None  # [n], NaN for a head with more targets than max_valid, else 0
    scales: RowScales  # scales of the rows' gradients
    gradient_scale: float  # a factor in scales, divided out of the products with the gradient
    gradient_unscale: Tensor | None  # 0-d, what their sums still have to be multiplied by

    @staticmethod
    def of(
        call: LossCall, selection: RowSelection, n_valid: Tensor, vocab_size: int, shard: VocabularyShard | None
    ) -> HeadTerms:
        """Computes the terms of a prepared call.

        Args:
            n_valid: ``[n]``, the number of targets of each head.
            vocab_size: Total number of classes.
        """
        row_weights = _row_weights(call, selection)
        divisors = _divisors(call, selection, n_valid, row_weights, shard)
        excess = _nan_in_excess(call, n_valid)
        scale = head_weights(call) / divisors
        scale = scale if excess is None else scale + excess
        factor = _gradient_scale(call, scale, row_weights, shard)
        scales = _row_scales(call, scale * factor, vocab_size, shard)
        host, device = (1.0, 1 / factor) if isinstance(factor, Tensor) else (factor, None)
        return HeadTerms(divisors, row_weights, excess, scales, gradient_scale=host, gradient_unscale=device)

    def weighted(self, losses: Tensor) -> Tensor:
        """Multiplies the flat rows' losses ``[n * B * S]`` by their token weights; 0 at rows without a target."""
        if self.excess is not None:
            losses = (losses.view(len(self.excess), -1) + self.excess[:, None]).flatten()
        return losses if self.row_weights is None else losses * self.row_weights


def head_weights(call: LossCall) -> Tensor:
    """Returns the head weights ``[n]``, 1 by default."""
    device = call.labels.device
    if call.head_weights is None:
        return torch.ones(call.n_heads, dtype=call.acc_dtype, device=device)
    return call.head_weights.detach().to(device=device, dtype=call.acc_dtype)


def plain_divisors(call: LossCall, n_valid: Tensor) -> Tensor:
    """Returns the divisors ``[n]`` of the heads' sums without token and class weights.

    Infinite for the mean of a head without targets, which is 0; NaN for a wrong tensor, unseen by the host of a GPU.
    """
    divisor, dtype = call.divisor, call.acc_dtype
    if divisor is None:
        counts = n_valid.to(dtype)
        return counts.where(counts != 0, math.inf)
    if not isinstance(divisor, Tensor):
        return torch.full((call.n_heads,), float(divisor), dtype=dtype, device=n_valid.device)
    given = divisor.detach().to(device=n_valid.device, dtype=dtype)
    return given.where((given > 0) & (given < math.inf), math.nan).expand(call.n_heads)


def float16_scale(rows_per_head: int) -> float:
    """Returns a power of two that keeps the gradient of a mean over ``rows_per_head`` rows from underflowing float16.

    It is divided out of the float32 products with that gradient.
    """
    scale = 1.0
    while 2 * scale <= min(rows_per_head, LARGEST_FLOAT16_SCALE):
        scale *= 2
    return scale


def _gradient_scale(
    call: LossCall, heads: Tensor, row_weights: Tensor | None, shard: VocabularyShard | None
) -> float | Tensor:
    """Returns what brings float16 gradients of the logits into range: a 0-d tensor if only the device knows.

    Args:
        heads: ``[n]``, the weight of each head's rows.
        row_weights: ``[n * B * S]``, another factor of it.
    """
    in_float16 = backend_of(heads.device).logits_dtype(call.compute_dtype) == torch.float16
    # Incoming row gradients have their own scale; a shard's logits are not float16.
    if not in_float16 or call.row_scale is not None or call.lse_grad is not None or shard is not None:
        return 1.0
    if call.divisor is None:
        return float16_scale(call.rows_per_head)
    if row_weights is None and not isinstance(call.divisor, Tensor):
        return call.divisor
    largest = heads.abs().amax()
    if row_weights is not None and len(row_weights):
        largest = largest * row_weights.abs().amax()
    return 1 / largest.clamp(min=SMALLEST_ROW_WEIGHT)


def _row_scales(call: LossCall, heads: Tensor, vocab_size: int, shard: VocabularyShard | None) -> RowScales:
    """Adds the sum of the class weights over the whole vocabulary to the heads' scales."""
    weights = call.options.class_weights
    if weights is None:
        return RowScales(heads, class_weight_sum=float(vocab_size))
    total = weights.double().sum()
    total = total if shard is None else shard.sum_(total)
    if can_read(total):
        return RowScales(heads, class_weight_sum=float(total))
    return RowScales(heads, class_weight_total=total.reshape(1))


def _row_weights(call: LossCall, selection: RowSelection) -> Tensor | None:
    if call.token_weights is None:
        return None
    at_targets = _at_targets(call.token_weights, call, selection).to(call.acc_dtype)
    if selection.valid is not None:
        at_targets = torch.where(selection.valid, at_targets, 0)
    n_rows = call.n_heads * call.rows_per_head
    weights = torch.zeros(n_rows, dtype=call.acc_dtype, device=call.labels.device)
    return weights.index_copy_(0, selection.flat, at_targets)


def _at_targets(table: Tensor, call: LossCall, selection: RowSelection) -> Tensor:
    """Gathers ``table [B, S']`` at the target of each selected row; arbitrary for rows without one."""
    rows = selection.flat
    head = rows.div(selection.rows_per_head, rounding_mode="floor")
    in_head = rows - head * selection.rows_per_head
    b = in_head.div(call.seq_len, rounding_mode="floor")
    column = in_head - b * call.seq_len + call.first_shift + head
    return table[b, column.clamp(max=table.shape[1] - 1)]


def _class_weights_of(weights: Tensor, targets: Tensor, shard: VocabularyShard | None) -> Tensor:
    """Returns ``class_weights[targets]``, from whichever shard holds the class."""
    if shard is None:
        # On a GPU targets are not validated: an invalid one has NaN loss, whatever its weight.
        return weights[targets.clamp(0, weights.shape[0] - 1)]
    local = targets - shard.start
    held = (local >= 0) & (local < shard.size)
    padded = torch.cat([weights, weights.new_zeros(1)])  # the last entry stands for classes of other shards
    return shard.sum_(padded[local.where(held, shard.size)])


def _divisors(
    call: LossCall, selection: RowSelection, n_valid: Tensor, row_weights: Tensor | None, shard: VocabularyShard | None
) -> Tensor:
    class_weights = call.options.class_weights
    if call.divisor is not None or (row_weights is None and class_weights is None):
        return plain_divisors(call, n_valid)
    if row_weights is not None:
        weights = row_weights[selection.flat]
    elif selection.valid is not None:
        weights = selection.valid.to(call.acc_dtype)
    else:
        weights = torch.ones(len(selection.rows), dtype=call.acc_dtype, device=call.labels.device)
    if class_weights is not None:
        targets = _at_targets(call.labels, call, selection).long()
        weights = weights * _class_weights_of(class_weights, targets, shard)
    sums, magnitudes = selection.sums_of_heads(weights), selection.sums_of_heads(weights.abs())
    # A mean without weight is 0, and one whose weights cancel is not defined.
    empty = torch.full_like(sums, math.inf).where(magnitudes == 0, math.nan)
    return sums.where(sums != 0, empty).to(call.acc_dtype)


def _nan_in_excess(call: LossCall, n_valid: Tensor) -> Tensor | None:
    if call.max_valid is None:
        return None
    excess = n_valid > backend_of(n_valid.device).constants(call.max_valid, torch.int64, n_valid.device)
    return torch.zeros(call.n_heads, dtype=call.acc_dtype, device=n_valid.device).masked_fill_(excess, float("nan"))
