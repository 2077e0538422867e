"""The labels of one step and how they count: what every schedule needs to know beside the hidden states."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mtp_ext.ops.common import checks


@dataclass(frozen=True)
class Targets:
    """Arguments of the loss, as :func:`mtp_ext.multi_token_cross_entropy` describes them; ``checked`` makes one."""

    labels: Tensor  # [B, S'], unshifted
    document_ids: Tensor | None  # [B, S']
    head_weights: Tensor | None  # [n]
    normalizer: str | float | Tensor
    ignore_index: int
    active: frozenset[int]  # heads that run; the weight of the others is known to be 0
    detach_heads: frozenset[int]
    detach_weight: frozenset[int]
    chunk_rows: int | None
    workspace_bytes: int | None
    max_valid: list[int] | None  # [n]

    @staticmethod
    def checked(
        labels: Tensor,
        *,
        batch: int,
        seq_len: int,
        n_heads: int,
        device: torch.device,
        document_ids: Tensor | None = None,
        head_weights: Tensor | Sequence[float] | None = None,
        normalizer: str | float | Tensor = "per_head",
        ignore_index: int = -100,
        detach_heads: Collection[int] = (),
        detach_weight: Collection[int] = (),
        chunk_rows: int | None = None,
        workspace_bytes: int | None = None,
        max_valid: int | Sequence[int] | None = None,
    ) -> Targets:
        """Raises TypeError or ValueError for the first wrong argument, before any work."""
        checks.check_tensor("labels", labels, dtypes=checks.INDEX_DTYPES, shape="[B, S']", device=device)
        if labels.dim() != 2 or labels.shape[0] != batch or labels.shape[1] < seq_len:
            raise ValueError(
                f"labels must be [B, S'] with B = {batch} and S' >= S = {seq_len} (unshifted; S + n loses no target), "
                f"got {checks.describe(labels)}"
            )
        checks.check_like_labels(labels, document_ids, None)
        checks.check_positive_int("chunk_rows", chunk_rows)
        checks.check_positive_int("workspace_bytes", workspace_bytes)
        weights = checks.checked_head_weights(head_weights, n_heads, device)
        return Targets(
            labels,
            document_ids,
            weights,
            checks.checked_normalizer(normalizer),
            ignore_index,
            _active_heads(head_weights if weights is None or weights.device.type != "cpu" else weights, n_heads),
            checks.checked_heads("detach_heads", detach_heads, n_heads),
            checks.checked_heads("detach_weight", detach_weight, n_heads),
            chunk_rows,
            workspace_bytes,
            checks.checked_max_valid(max_valid, n_heads),
        )

    def of_the_loss(self) -> dict[str, Any]:
        """Keywords that define the loss."""
        return {
            "document_ids": self.document_ids,
            "head_weights": self.head_weights,
            "normalizer": self.normalizer,
            "ignore_index": self.ignore_index,
            "detach_weight": self.detach_weight,
        }

    def of_the_chunks(self) -> dict[str, Any]:
        """Keywords that bound the memory of the fused loss and leave its value alone."""
        return {"chunk_rows": self.chunk_rows, "workspace_bytes": self.workspace_bytes}


def _active_heads(head_weights: Tensor | Sequence[float] | None, n_heads: int) -> frozenset[int]:
    """The heads whose weight is not known to be 0. A weight that is learned needs its head's loss, and one on a GPU is
    not looked at: that would be a synchronisation."""
    every = frozenset(range(1, n_heads + 1))
    if head_weights is None or torch.compiler.is_compiling():
        return every
    if isinstance(head_weights, Tensor):
        if head_weights.requires_grad or head_weights.device.type != "cpu":
            return every
        head_weights = head_weights.tolist()
    return frozenset(k for k, weight in enumerate(head_weights, 1) if weight != 0)
