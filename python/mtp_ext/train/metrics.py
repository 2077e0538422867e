"""What a step or an evaluation measures, as numbers."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from mtp_ext.ops import MultiTokenLoss


@dataclass(frozen=True)
class HeadMetrics:
    """The loss of ``n`` heads and what its pass over the logits measured.

    Attributes:
        loss: The objective: the weighted sum over the heads, in nats.
        head_loss: Each head's loss in nats per token.
        n_valid: Each head's number of targets.
        top1: The fraction of targets that each head ranks first.
        accept_length: Mean tokens that one self-speculative step would emit.
    """

    loss: float
    head_loss: list[float]
    n_valid: list[int]
    top1: list[float]
    accept_length: float

    @property
    def is_finite(self) -> bool:
        """Whether every loss is a number."""
        return all(map(math.isfinite, (self.loss, *self.head_loss)))

    def as_dict(self) -> dict[str, Any]:
        """The fields, for the record."""
        return asdict(self)


class HeadTotals:
    """Sums `MultiTokenLoss` over batches, so that the means are those of one large batch.

    Losses and top-1 are weighted by each head's number of targets. The accept length is weighted by the targets of the
    last head: a position counts in it only where all heads have a target.

    Args:
        head_weights: Weight of each head in the objective; ``None`` is 1 each.
    """

    def __init__(self, head_weights: Sequence[float] | None = None) -> None:
        self._weights = None if head_weights is None else torch.tensor(head_weights, dtype=torch.float64)
        self._parts: list[Tensor] = []

    def add(self, result: MultiTokenLoss) -> None:
        """Adds a batch; nothing waits for the device here."""
        counts = result.n_valid.double()
        accept = result.accept_length.detach().double() * counts[-1:]
        self._parts.append(
            torch.cat([counts, result.head_loss.detach().double() * counts, result.top1.double() * counts, accept])
        )

    def metrics(self) -> HeadMetrics:
        """The means over all batches so far."""
        total = torch.stack(self._parts).sum(0).cpu()
        n = (total.numel() - 1) // 3
        counts, loss, top1 = total[:-1].view(3, n)
        divisor = counts.clamp(min=1)
        head_loss = loss / divisor
        weighted = head_loss if self._weights is None else head_loss * self._weights
        return HeadMetrics(
            loss=float(weighted.sum()),
            head_loss=head_loss.tolist(),
            n_valid=[int(c) for c in counts.tolist()],
            top1=(top1 / divisor).tolist(),
            accept_length=float(total[-1] / divisor[-1]) if counts[-1] > 0 else 1.0,
        )


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
