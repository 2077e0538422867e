"""What a step or an evaluation measures, as numbers."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from mtp_ext.ops import MultiTokenLoss


@dataclass(frozen=True)
class HeadMetrics:
    """Means of :class:`mtp_ext.ops.MultiTokenLoss` over batches; a field of that name is averaged by being here.

    Attributes:
        loss: The objective: the weighted sum over the heads, in nats.
        n_valid: Each head's number of targets.
        head_loss: Each head's loss in nats per token.
        top1: The fraction of targets that each head ranks first.
        accept_length: Mean tokens that one self-speculative step would emit.
    """

    loss: float
    n_valid: list[int]
    head_loss: list[float]
    top1: list[float]
    accept_length: float

    @property
    def is_finite(self) -> bool:
        """Whether every loss is a number."""
        return all(map(math.isfinite, (self.loss, *self.head_loss)))

    def as_dict(self) -> dict[str, Any]:
        """The fields, for the record."""
        return asdict(self)


AVERAGED = tuple(field.name for field in fields(HeadMetrics) if field.name not in ("loss", "n_valid"))


class HeadTotals:
    """Sums :class:`mtp_ext.ops.MultiTokenLoss` over batches, so that the means are those of one large batch.

    A value of each head is weighted by the head's number of targets, a value of all heads by that of the last head: a
    position counts in it only where all heads have a target.

    Args:
        head_weights: Weight of each head in the objective; ``None`` is 1 each.
    """

    def __init__(self, head_weights: Sequence[float] | None = None) -> None:
        self._weights = head_weights
        self._counts: list[Tensor] = []
        self._sums: dict[str, list[Tensor]] = {name: [] for name in AVERAGED}

    def add(self, result: MultiTokenLoss) -> None:
        """Adds a batch, without a synchronisation."""
        counts = result.n_valid.double()
        self._counts.append(counts)
        for name, parts in self._sums.items():
            value = getattr(result, name).detach().double()
            parts.append(value * (counts if value.dim() else counts[-1]))

    def metrics(self) -> HeadMetrics:
        """The means over all batches so far."""
        counts = torch.stack(self._counts).sum(0).cpu()
        means: dict[str, Any] = {}
        for name, parts in self._sums.items():
            total = torch.stack(parts).sum(0).cpu()
            means[name] = (total / (counts if total.dim() else counts[-1]).clamp(min=1)).tolist()
        if counts[-1] == 0:
            means["accept_length"] = 1.0
        weights = self._weights or [1.0] * len(counts)
        loss = sum(loss * weight for loss, weight in zip(means["head_loss"], weights, strict=True))
        return HeadMetrics(loss=loss, n_valid=[int(c) for c in counts.tolist()], **means)


def memory_bytes(device: torch.device) -> int:
    """Peak memory of this process in bytes: allocated on the GPU, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # not a POSIX system
        import psutil

        memory = psutil.Process().memory_info()
        return int(getattr(memory, "peak_wset", memory.rss))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes everywhere but on macOS
