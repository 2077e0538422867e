"""Fused linear layer and cross-entropy: one unembedding, one target per row."""

from __future__ import annotations

import torch
from torch import Tensor

from mtp_ext.ops.common import checks
from mtp_ext.ops.common.runtime import autocast_dtype
from mtp_ext.ops.loss import plain_call
from mtp_ext.ops.loss.arguments import LossCall
from mtp_ext.ops.loss.autograd import reduced_loss, row_losses
from mtp_ext.ops.loss.options import RowOptions


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
    chunk_rows: int | None = None,
    workspace_bytes: int | None = None,
    grad_weight_out: Tensor | None = None,
    grad_scale: float | Tensor | None = None,
    max_valid: int | None = None,
    group: torch.distributed.ProcessGroup | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Computes ``cross_entropy(hidden @ weight.T + bias, targets)`` and its gradients without storing the logits.

    Args:
        hidden: ``[..., D]``, float32, bfloat16, float16 (float64 on the CPU).
        weight: ``[V, D]`` on the same device; may differ in dtype under autocast.
        targets: ``[...]`` int64 or int32, each in ``[0, V)`` or equal to ``ignore_index``.
        bias: ``[V]``.
        class_weights: ``[V]`` floats, used in the loss's dtype, as in :func:`torch.nn.functional.cross_entropy`.
        token_weights: ``[...]`` floats. ``"mean"`` divides by the sum of the weights (torch's rule for class weights; 0
            if all are 0, NaN if they cancel); rows of weight 0 cost nothing.
        ignore_index: Target of rows without loss or gradient.
        reduction: ``"mean"``, ``"sum"``, or ``"none"`` (recomputes the logits in backward: 8 N D V FLOP instead of 6).
        label_smoothing: In [0, 1], as in torch.
        z_loss: Adds ``z_loss * lse**2`` per token (PaLM, arXiv 2204.02311, section 5).
        softcap: ``logits <- softcap * tanh(logits / softcap)`` (Gemma 2, arXiv 2408.00118).
        logit_scale: Multiplies the logits, before the cap.
        return_lse: Also return the log-sum-exp of each row's logits, differentiable (recomputes like ``"none"``).
        chunk_rows: Maximum number of rows whose logits are held at once; chosen by a cost model by default.
        workspace_bytes: The same limit, in bytes of logits.
        grad_weight_out: Float32 buffer of ``weight``'s shape (float64 for float64 inputs) to which backward adds the
            weight's gradient; ``weight`` then gets no gradient.
        grad_scale: With ``grad_weight_out``, the gradient that the loss will receive (1, a loss scale, 1 over the
            number of micro-batches), a positive number or 0-d tensor: the forward adds to the buffer at once, and no
            other gradient of the weight is ever formed. Backward raises ValueError for another gradient (on a GPU,
            unless in debug checks, it gives NaN).
        max_valid: Upper bound on the number of targets (not ignored, of non-zero weight), if the host knows one, for
            example from the batch before it moves to the GPU. A GPU then processes only that many rows, without a
            sync. If exceeded: ValueError on the CPU, NaN loss and gradients on a GPU.
        group: Process group of a sharded vocabulary: ``weight``, ``bias`` and ``class_weights`` are this rank's shard,
            in rank order, of equal or unequal sizes; all else is the same on every rank, and so are the results.

    Returns:
        The loss in nats: 0-d, or ``[...]`` for ``"none"``; float32, or float64 for float64 inputs; with
        ``return_lse`` also lse ``[...]``, 0 at ignored rows. Differentiable once, with respect to ``hidden``,
        ``weight`` and ``bias``. 0 without valid targets.

    Raises:
        TypeError, ValueError: An argument of wrong type, dtype, shape, device or range; a target outside ``[0, V)``.

    Example:
        >>> hidden, weight = torch.zeros(5, 8, requires_grad=True), torch.zeros(100, 8, requires_grad=True)
        >>> loss = linear_cross_entropy(hidden, weight, torch.tensor([3, 1, 4, 1, -100]))
        >>> loss.backward()
        >>> round(loss.item(), 4)  # all logits are equal: log 100
        4.6052

    Reference: :func:`torch.nn.functional.cross_entropy` of :func:`torch.nn.functional.linear`.
    """
    if (
        bias is class_weights is token_weights is grad_weight_out is grad_scale is None
        and chunk_rows is workspace_bytes is max_valid is None
        and softcap is None
        and group is None
        and (label_smoothing, z_loss, logit_scale, return_lse) == (0.0, 0.0, 1.0, False)
        and not isinstance(label_smoothing, bool)
        and not isinstance(z_loss, bool)
        and not isinstance(logit_scale, bool)
        and plain_call.takes(hidden, weight, targets, ignore_index, reduction)
    ):
        return plain_call.plain_loss(hidden, weight, targets, ignore_index, reduction)
    compute_dtype = _check_inputs(hidden, weight, targets, token_weights, group is not None)
    call = LossCall(
        labels=targets.reshape(1, -1),
        seq_len=targets.numel(),
        n_heads=1,
        first_shift=0,
        compute_dtype=compute_dtype,
        options=RowOptions(
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            softcap=softcap,
            logit_scale=logit_scale,
            class_weights=class_weights,
        ),
        bias=bias,
        token_weights=None if token_weights is None else token_weights.reshape(1, -1),
        ignore_index=ignore_index,
        reduction=reduction,
        chunk_rows=chunk_rows,
        workspace_bytes=workspace_bytes,
        grad_weight_out=grad_weight_out,
        grad_scale=checks.checked_grad_scale(grad_scale, grad_weight_out, "none" if return_lse else reduction),
        group=group,
        max_valid=checks.checked_max_valid(max_valid, 1),
        with_metrics=False,
    )
    call.check(weight)
    if reduction != "none" and not return_lse:
        return reduced_loss(call, weight, (hidden,)).loss
    result, lse = row_losses(call, weight, (hidden,))
    loss = result.loss.view(targets.shape) if reduction == "none" else result.loss
    return (loss, lse.view(targets.shape)) if return_lse else loss


def _check_inputs(
    hidden: Tensor, weight: Tensor, targets: Tensor, token_weights: Tensor | None, sharded: bool
) -> torch.dtype:
    """Checks the tensors and returns the dtype of the GEMM operands."""
    checks.check_tensor("hidden", hidden, dtypes=checks.FLOAT_DTYPES, shape="[..., D]")
    if hidden.dim() == 0:
        raise ValueError(f"hidden must be [..., D], got {checks.describe(hidden)}")
    checks.check_tensor("weight", weight, dtypes=checks.FLOAT_DTYPES, shape="[V, D]", device=hidden.device)
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1] or (weight.shape[0] == 0 and not sharded):
        raise ValueError(
            f"weight must be [V, D] with V >= 1 and D = {hidden.shape[-1]} of hidden, got {checks.describe(weight)}"
        )
    autocast = autocast_dtype(hidden)
    checks.check_same_dtype(hidden.dtype, "weight", weight, autocast is not None)
    checks.check_tensor("targets", targets, dtypes=checks.INDEX_DTYPES, shape="[...]", device=hidden.device)
    checks.check_shape("targets", targets, hidden.shape[:-1], "hidden's without D")
    if token_weights is not None:
        checks.check_tensor(
            "token_weights", token_weights, dtypes=checks.FLOAT_DTYPES, shape="[...]", device=hidden.device
        )
        checks.check_shape("token_weights", token_weights, targets.shape, "that of targets")
    return autocast or hidden.dtype
