"""Metrics of a step or an evaluation."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from mtp_ext.ops import MultiTokenLoss


@dataclass(frozen=True)
class HeadMetrics:
    """Means of :class:`mtp_ext.ops.MultiTokenLoss` over batches; fields with the same name are averaged.

    Attributes:
        loss: The objective: the weighted sum over the heads, in nats.
        n_valid: Each head's number of targets.
        head_loss: Each head's loss in nats per token.
        top1: The fraction of targets that each head ranks first.
        accept_length: Mean tokens that one self-speculative step would emit.

    ``head_loss`` and ``top1`` are ``None`` for a head that has no targets or did not run, ``accept_length`` if the last
    head has no targets.
    """

    loss: float
    n_valid: list[int]
    head_loss: list[float | None]
    top1: list[float | None]
    accept_length: float | None

    @property
    def is_finite(self) -> bool:
        """True if all losses are finite."""
        return all(math.isfinite(loss) for loss in (self.loss, *self.head_loss) if loss is not None)

    def as_dict(self) -> dict[str, Any]:
        """Returns the fields as a record."""
        return asdict(self)


AVERAGED = tuple(field.name for field in fields(HeadMetrics) if field.name not in ("loss", "n_valid"))


class HeadTotals:
    """Sums :class:`mtp_ext.ops.MultiTokenLoss` over batches, so that the means are those of one large batch.

    Per-head values are weighted by the head's number of targets. Values over all heads are weighted by that of the last
    head, because they only include positions where all heads have a target.

    Args:
        head_weights: Weight of each head in the objective; ``None`` is 1 each.
        skips_zeros: Whether heads of weight 0 did not run, as in training; they then count as without targets.
    """

    def __init__(self, head_weights: Sequence[float] | None = None, *, skips_zeros: bool = False) -> None:
        self._weights, self._skips_zeros = head_weights, skips_zeros
        self._counts: list[Tensor] = []
        self._sums: dict[str, list[Tensor]] = {name: [] for name in AVERAGED}

    def add(self, result: MultiTokenLoss) -> None:
        """Adds a batch, without a GPU sync."""
        counts = result.n_valid.double()
        self._counts.append(counts)
        for name, parts in self._sums.items():
            value = getattr(result, name).detach().double()
            parts.append(value * (counts if value.dim() else counts[-1]))

    def metrics(self, over_ranks: Callable[[Tensor], Tensor] = lambda x: x) -> HeadMetrics:
        """Returns the means over all batches so far.

        Args:
            over_ranks: Sums a CPU tensor over processes that each added their own batches.
        """
        counts = over_ranks(torch.stack(self._counts).sum(0).cpu())
        weights = self._weights or [1.0] * len(counts)
        ran = torch.tensor([not self._skips_zeros or weight != 0 for weight in weights])
        means: dict[str, Any] = {}
        for name, parts in self._sums.items():
            total = over_ranks(torch.stack(parts).sum(0).cpu())
            means[name] = _means(total, counts * ran if total.dim() else counts[-1])
        loss = sum((loss or 0.0) * weight for loss, weight in zip(means["head_loss"], weights, strict=True))
        return HeadMetrics(loss=loss, n_valid=[int(c) for c in counts.tolist()], **means)


def _means(totals: Tensor, counts: Tensor) -> Any:
    """Returns totals over counts, a number or a list of numbers; ``None`` where a count is 0."""
    if totals.dim():
        return [_means(total, count) for total, count in zip(totals, counts, strict=True)]
    return float(totals / counts) if counts else None


def shown(value: float | None, form: str) -> str:
    """Formats a number as `format` does, and a missing one as a dash."""
    return "-" if value is None else format(value, form)


def finite(value: Any) -> Any:
    """Replaces infinities and NaN, which JSON lacks, by ``None`` in a record."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def memory_bytes(device: torch.device) -> int:
    """Returns this process's peak memory in bytes: allocated on the GPU, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # not a POSIX system
        import psutil

        memory = psutil.Process().memory_info()
        return int(getattr(memory, "peak_wset", memory.rss))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # in kilobytes except on macOS
