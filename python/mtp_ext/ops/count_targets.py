"""Counts the targets of a batch on the CPU, before it moves to the GPU: the losses' ``max_valid``."""

from __future__ import annotations

import torch
from torch import Tensor

from mtp_ext.ops.common import checks
from mtp_ext.ops.common.backend import backend_of
from mtp_ext.ops.loss.arguments import LossCall
from mtp_ext.ops.loss.row_kernels import prepared, select_rows

_ANY_CLASS = 2**62


def count_targets(
    labels: Tensor,
    n_heads: int,
    *,
    seq_len: int,
    document_ids: Tensor | None = None,
    token_weights: Tensor | None = None,
    ignore_index: int = -100,
) -> list[int]:
    """Counts each head's targets as :func:`mtp_ext.multi_token_cross_entropy` does.

    Call it while the batch is still on the CPU and pass the result to the loss on a GPU as ``max_valid``: ignored
    labels, padding and targets in other documents then cost no GEMM work, without a GPU sync. Round the numbers up
    where shapes must repeat (CUDA graphs, compiled models).

    Args:
        labels: ``[B, S']`` int64 or int32, unshifted.
        n_heads: ``n``.
        seq_len: ``S``, the sequence length of the hidden states; ``S' >= S``.
        document_ids: ``[B, S']`` integers.
        token_weights: ``[B, S']``.
        ignore_index: Label of positions that are not counted.

    Returns:
        ``n`` counts, each at most ``B * S``.

    Raises:
        TypeError, ValueError: An argument of wrong type, dtype, shape or device.

    Example:
        >>> import torch
        >>> count_targets(torch.tensor([[3, 1, 4, -100, 5]]), 2, seq_len=4)
        [3, 2]
    """
    checks.check_int("n_heads", n_heads)
    checks.check_int("seq_len", seq_len)
    checks.check_int("ignore_index", ignore_index)
    checks.check_tensor("labels", labels, dtypes=checks.INDEX_DTYPES, shape="[B, S']")
    if n_heads < 1:
        raise ValueError(f"n_heads must be at least 1, got {n_heads}")
    if labels.dim() != 2 or not 0 <= seq_len <= labels.shape[1]:
        raise ValueError(f"labels must be [B, S'] with S' >= seq_len = {seq_len} >= 0, got {checks.describe(labels)}")
    checks.check_like_labels(labels, document_ids, token_weights)
    backend_of(labels.device).check_built()
    call = LossCall(
        labels=labels,
        seq_len=seq_len,
        n_heads=n_heads,
        first_shift=1,
        compute_dtype=torch.float32,
        document_ids=document_ids,
        token_weights=token_weights,
        ignore_index=ignore_index,
    )
    counts: list[int] = select_rows(prepared(call), _ANY_CLASS).counts.tolist()
    return counts
