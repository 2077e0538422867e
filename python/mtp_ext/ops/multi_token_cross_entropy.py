"""Fused loss of n future-token heads over one unembedding."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from mtp_ext.ops.common import checks
from mtp_ext.ops.common.result import MultiTokenLoss
from mtp_ext.ops.common.runtime import autocast_dtype
from mtp_ext.ops.loss.arguments import LossCall
from mtp_ext.ops.loss.autograd import reduced_loss, row_losses
from mtp_ext.ops.loss.options import RowOptions


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
    chunk_rows: int | None = None,
    workspace_bytes: int | None = None,
    grad_weight_out: Tensor | None = None,
    grad_scale: float | Tensor | None = None,
    max_valid: int | Sequence[int] | None = None,
    group: torch.distributed.ProcessGroup | None = None,
) -> MultiTokenLoss:
    """Computes the cross-entropy of ``n`` future-token heads and its gradients without storing the logits.

    ``loss = sum_k head_weights[k] * head_loss[k]``, where ``head_loss[k]`` is the mean over positions ``s`` of
    ``-log softmax(weight @ hidden[k, b, s])[labels[b, s + k]]``, ``k = 1..n``.

    Args:
        hidden: ``[n, B, S, D]``, or a sequence of ``n`` tensors ``[B, S, D]``; float32, bfloat16, float16 (float64 on
            the CPU).
        weight: ``[V, D]`` shared by the heads, or ``[n, V, D]``, one per head.
        labels: ``[B, S']`` int64 or int32, ``S' >= S``, UNSHIFTED token ids: head ``k`` at position ``s`` predicts
            ``labels[:, s + k]``. Targets past the end are ignored: pass ``S' = S + n`` to lose none.
        document_ids: ``[B, S']`` integers. A target counts only if it is in the same document as its position.
        head_weights: ``n`` floats or a tensor ``[n]``; default all 1, the paper's sum.
        token_weights: ``[B, S']`` floats, the weight of ``labels[b, j]`` as a target. Means divide by the sum of the
            weights (torch's rule for class weights; 0 if all are 0, NaN if they cancel); targets of weight 0 cost
            nothing.
        normalizer: ``"per_head"``: each head's mean over its own valid targets. A number or 0-d tensor, positive and
            finite, divides each head's sum (for example a token count over all ranks). A wrong one raises ValueError; a
            GPU's tensor, which the host does not read, gives NaN.
        detach_weight: 1-based heads whose loss sends no gradient to ``weight``.
        bias: ``[V]``.
        class_weights: ``[V]`` floats, used in the loss's dtype, as in :func:`torch.nn.functional.cross_entropy`.
        ignore_index: Label of positions without loss or gradient.
        reduction: ``"mean"`` (by ``normalizer``), ``"sum"``, or ``"none"``: ``loss`` is ``[n, B, S]``, each target's
            loss times its head and token weights, 0 where there is no target, and ``head_loss`` holds the heads' sums.
            Backward takes any incoming gradient and recomputes the logits (8 N D V FLOP instead of 6).
        label_smoothing: In [0, 1], as in torch.
        z_loss: Adds ``z_loss * lse**2`` per token (PaLM, arXiv 2204.02311, section 5).
        softcap: ``logits <- softcap * tanh(logits / softcap)`` (Gemma 2, arXiv 2408.00118).
        logit_scale: Multiplies the logits, before the cap.
        chunk_rows: Maximum number of rows whose logits are held at once; chosen by a cost model by default.
        workspace_bytes: The same limit, in bytes of logits.
        grad_weight_out: Float32 buffer of ``weight``'s shape (float64 for float64 inputs) to which backward adds the
            weight's gradient; ``weight`` then gets no gradient.
        grad_scale: With ``grad_weight_out``, the gradient that the loss will receive (1, a loss scale, 1 over the
            number of micro-batches), a positive number or 0-d tensor: the forward adds to the buffer at once, and no
            other gradient of the weight is ever formed. Backward raises ValueError for another gradient (on a GPU,
            unless in debug checks, it gives NaN).
        max_valid: Upper bound on the number of targets, one for all heads or ``n`` of them, if the host knows it (from
            the batch before it moves to the GPU: :func:`mtp_ext.count_targets`). A GPU then processes only that many
            rows, without a sync. If exceeded: ValueError on the CPU, NaN loss and gradients on a GPU.
        group: Process group of a sharded vocabulary: ``weight``, ``bias`` and ``class_weights`` are this rank's shard,
            in rank order, of equal or unequal sizes; all else is the same on every rank, and so are the results.

    Returns:
        :class:`MultiTokenLoss`; only ``loss`` is differentiable, once, with respect to ``hidden``, ``weight``, ``bias``
        and ``head_weights``. float32, or float64 for float64 inputs. A head without valid targets contributes 0.

    Raises:
        TypeError, ValueError: An argument of wrong type, dtype, shape, device or range; a target outside ``[0, V)``.

    Example:
        >>> n, B, S, D, V = 2, 1, 4, 8, 100
        >>> hidden, weight = torch.zeros(n, B, S, D, requires_grad=True), torch.zeros(V, D, requires_grad=True)
        >>> out = multi_token_cross_entropy(hidden, weight, torch.tensor([[3, 1, 4, 1, 5, 9]]))
        >>> out.loss.backward()
        >>> [round(x, 4) for x in out.head_loss.tolist()], out.n_valid.tolist()
        ([4.6052, 4.6052], [4, 4])

    Reference: Gloeckle et al. 2024, Better & Faster Large Language Models via Multi-token Prediction, section 2.
    """
    stacked = isinstance(hidden, Tensor)
    heads = (hidden,) if isinstance(hidden, Tensor) else checks.checked_items("hidden", hidden, "n tensors [B, S, D]")
    n_heads, seq_len = _check_hidden(heads, stacked, labels)
    autocast = autocast_dtype(heads[0])
    _check_weight(heads[0], weight, n_heads, autocast is not None, group is not None)
    checks.check_like_labels(labels, document_ids, token_weights)
    call = LossCall(
        labels=labels,
        seq_len=seq_len,
        n_heads=n_heads,
        first_shift=1,
        compute_dtype=autocast or heads[0].dtype,
        options=RowOptions(
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            softcap=softcap,
            logit_scale=logit_scale,
            class_weights=class_weights,
        ),
        bias=bias,
        head_weights=checks.checked_head_weights(head_weights, n_heads, heads[0].device),
        document_ids=document_ids,
        token_weights=token_weights,
        normalizer=checks.checked_normalizer(normalizer),
        reduction=reduction,
        ignore_index=ignore_index,
        detach_weight=checks.checked_heads("detach_weight", detach_weight, n_heads),
        max_valid=checks.checked_max_valid(max_valid, n_heads),
        chunk_rows=chunk_rows,
        workspace_bytes=workspace_bytes,
        grad_weight_out=grad_weight_out,
        grad_scale=checks.checked_grad_scale(grad_scale, grad_weight_out, reduction),
        group=group,
    )
    call.check(weight)
    return reduced_loss(call, weight, heads) if reduction != "none" else row_losses(call, weight, heads)[0]


def _check_hidden(heads: tuple[Tensor, ...], stacked: bool, labels: Tensor) -> tuple[int, int]:
    """Checks the hidden states and labels, and returns ``(n, S)``."""
    shape = "[n, B, S, D]" if stacked else "of n tensors [B, S, D]"
    if not heads:
        raise ValueError("hidden must hold at least one head, got an empty sequence")
    for k, h in enumerate(heads):
        name = "hidden" if stacked else f"hidden[{k}]"
        device = heads[0].device if k else None
        checks.check_tensor(name, h, dtypes=checks.FLOAT_DTYPES, shape=shape, device=device)
        if h.dim() != (4 if stacked else 3):
            raise ValueError(f"{name} must be {shape}, got {checks.describe(h)}")
        if h.dtype != heads[0].dtype:
            raise TypeError(f"{name} must have the dtype of hidden[0], got {checks.describe(h)}")
        checks.check_shape(name, h, heads[0].shape, "that of the first head")
    batch, seq_len = heads[0].shape[-3:-1]
    checks.check_labels(labels, batch, seq_len, heads[0].device)
    n_heads = heads[0].shape[0] if stacked else len(heads)
    if n_heads == 0:
        raise ValueError(f"hidden must hold at least one head, got {checks.describe(heads[0])}")
    return n_heads, seq_len


def _check_weight(hidden: Tensor, weight: Tensor, n_heads: int, autocast: bool, sharded: bool) -> None:
    checks.check_tensor("weight", weight, dtypes=checks.FLOAT_DTYPES, shape="[V, D]", device=hidden.device)
    width = hidden.shape[-1]
    if weight.dim() not in (2, 3) or weight.shape[-1] != width or weight.shape[:-2] not in ((), (n_heads,)):
        raise ValueError(
            f"weight must be [V, D] or [n, V, D] with n = {n_heads}, D = {width}, got {checks.describe(weight)}"
        )
    if weight.shape[-2] == 0 and not sharded:
        raise ValueError(f"weight must have at least one class, got {checks.describe(weight)}")
    checks.check_same_dtype(hidden.dtype, "weight", weight, autocast)
