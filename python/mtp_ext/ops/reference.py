"""Reference losses in plain torch, with full logits, in any dtype. In float64 they are the oracle of every test."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mtp_ext.ops.common.result import MultiTokenLoss, RowTables, head_metrics
from mtp_ext.ops.loss.arguments import LossCall


def logits_of(
    hidden: Tensor, weight: Tensor, *, bias: Tensor | None, softcap: float | None, logit_scale: float
) -> Tensor:
    """The logits ``[..., V]`` after bias, scale and cap."""
    logits = F.linear(hidden, weight, bias)
    if logit_scale != 1.0:
        logits = logits * logit_scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def token_losses(
    logits: Tensor,
    targets: Tensor,
    *,
    class_weights: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
) -> tuple[Tensor, Tensor]:
    """Loss and log-sum-exp of each row: ``logits [N, V]``, ``targets [N]`` -> two ``[N]``; 0 where ignored."""
    valid = targets != ignore_index
    logits = logits if logits.dtype == torch.float64 else logits.float()
    logits = torch.where(valid[:, None], logits, 0)  # NaN in an ignored row must not reach a gradient
    if class_weights is not None:
        class_weights = class_weights.to(logits.dtype)
    loss = F.cross_entropy(
        logits,
        targets.long(),
        weight=class_weights,
        ignore_index=ignore_index,
        reduction="none",
        label_smoothing=label_smoothing,
    )
    lse = torch.where(valid, torch.logsumexp(logits, dim=-1), 0)
    return loss + z_loss * lse**2, lse


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    class_weights: Tensor | None = None,
    token_weights: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Reference of :func:`mtp_ext.linear_cross_entropy`, with its arguments and results."""
    flat, kept = targets.reshape(-1), hidden.reshape(-1, hidden.shape[-1])
    if token_weights is not None:
        flat = torch.where(token_weights.reshape(-1) != 0, flat, ignore_index)
    logits = logits_of(kept, weight, bias=bias, softcap=softcap, logit_scale=logit_scale)
    loss, lse = token_losses(
        logits,
        flat,
        class_weights=class_weights,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
    )
    weights = target_weights(flat, class_weights, token_weights, ignore_index, loss.dtype)
    if token_weights is not None:
        loss = loss * token_weights.reshape(-1).to(loss.dtype)
    if reduction == "none":
        loss = loss.view(targets.shape)
    else:
        loss = loss.sum()
        if reduction == "mean":
            loss = loss / mean_divisor(weights)
    return (loss, lse.view(targets.shape)) if return_lse else loss


def target_weights(
    targets: Tensor,
    class_weights: Tensor | None,
    token_weights: Tensor | None,
    ignore_index: int,
    dtype: torch.dtype,
) -> Tensor:
    """The weight of each target in the denominator of a mean."""
    valid = targets != ignore_index
    weights = valid.to(dtype)
    if class_weights is not None:
        weights = weights * class_weights.to(dtype)[torch.where(valid, targets, 0).long()]
    if token_weights is not None:
        weights = weights * token_weights.reshape(-1).to(dtype)
    return weights


def mean_divisor(weights: Tensor) -> Tensor:
    """The sum of the weights; infinite if all are 0, so that the mean is 0, and NaN if they cancel."""
    total = weights.sum()
    return torch.where(total != 0, total, torch.where((weights != 0).any(), torch.nan, torch.inf))


def row_tables(logits: Tensor, valid: Tensor) -> RowTables:
    """The tables that metrics read, from logits ``[B, S, V]`` where ``valid [B, S]``; losses are 0."""
    lse = torch.logsumexp(logits if logits.dtype == torch.float64 else logits.float(), dim=-1)
    return RowTables(
        loss=torch.zeros_like(lse), lse=torch.where(valid, lse, 0), predicted=torch.where(valid, logits.argmax(-1), -1)
    )


def shifted_targets(labels: Tensor, k: int, seq_len: int, document_ids: Tensor | None, ignore_index: int) -> Tensor:
    """The target of head ``k`` at each position, ``[B, S]``; ``ignore_index`` where it has none."""
    targets = torch.full_like(labels[:, :seq_len], ignore_index)
    width = min(seq_len, labels.shape[1] - k)
    if width > 0:
        targets[:, :width] = labels[:, k : k + width]
        if document_ids is not None:
            same = document_ids[:, k : k + width] == document_ids[:, :width]
            targets[:, :width] = torch.where(same, targets[:, :width], ignore_index)
    return targets


def multi_token_cross_entropy(
    hidden: Tensor | Sequence[Tensor],
    weight: Tensor,
    labels: Tensor,
    *,
    document_ids: Tensor | None = None,
    head_weights: Tensor | Sequence[float] | None = None,
    token_weights: Tensor | None = None,
    normalizer: str | float | Tensor = "per_head",
    detach_weight: Collection[int] = (),
    bias: Tensor | None = None,
    class_weights: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> MultiTokenLoss:
    """Reference of :func:`mtp_ext.multi_token_cross_entropy`, head by head, from the definition."""
    n_heads, seq_len = len(hidden), hidden[0].shape[1]
    per_head = reduction == "mean" and isinstance(normalizer, str)
    options: dict[str, Any] = {"bias": bias, "softcap": softcap, "logit_scale": logit_scale}
    losses, n_valid, tables = [], [], []
    for k in range(1, n_heads + 1):
        targets = shifted_targets(labels, k, seq_len, document_ids, ignore_index)
        weights = None
        if token_weights is not None:
            weights = F.pad(token_weights, (0, n_heads))[:, k : k + seq_len]
            targets = torch.where(weights != 0, targets, ignore_index)
        unembed = weight[k - 1] if weight.dim() == 3 else weight
        unembed = unembed.detach() if k in detach_weight else unembed
        losses.append(
            linear_cross_entropy(
                hidden[k - 1],
                unembed,
                targets,
                class_weights=class_weights,
                token_weights=weights,
                ignore_index=ignore_index,
                reduction="mean" if per_head else "none",
                label_smoothing=label_smoothing,
                z_loss=z_loss,
                **options,
            )
        )
        valid = targets != ignore_index
        n_valid.append(valid.sum())
        with torch.no_grad():
            tables.append(row_tables(logits_of(hidden[k - 1], unembed, **options), valid))
    each = torch.stack([x for x in losses if isinstance(x, Tensor)])  # [n], or [n, B, S]
    head_loss = each if per_head else each.sum((1, 2))
    if reduction == "mean" and not isinstance(normalizer, str):
        if isinstance(normalizer, Tensor):  # NaN for a wrong one, which a GPU's host does not see
            given = normalizer.to(head_loss)
            normalizer = torch.where((given > 0) & (given < torch.inf), given, torch.nan)
        head_loss = head_loss / normalizer
    scale = torch.ones_like(head_loss) if head_weights is None else torch.as_tensor(head_weights).to(head_loss)
    counts = torch.stack(n_valid)
    stacked = RowTables._make(torch.stack(of_heads) for of_heads in zip(*tables, strict=True))
    return MultiTokenLoss(
        loss=each * scale[:, None, None] if reduction == "none" else (head_loss * scale).sum(),
        head_loss=head_loss.detach(),
        n_valid=counts,
        **head_metrics(stacked, labels, counts, first_shift=1),
    )


def loss_of(call: LossCall, hidden: Sequence[Tensor], weight: Tensor) -> MultiTokenLoss:
    """Calls :func:`multi_token_cross_entropy` with a call's arguments."""
    row_options = {f.name: getattr(call.options, f.name) for f in dataclasses.fields(call.options)}
    return multi_token_cross_entropy(
        hidden,
        weight,
        call.labels,
        document_ids=call.document_ids,
        head_weights=call.head_weights,
        token_weights=call.token_weights,
        normalizer=call.normalizer,
        detach_weight=call.detach_weight,
        bias=call.bias,
        ignore_index=call.ignore_index,
        reduction=call.reduction,
        **row_options,
    )
