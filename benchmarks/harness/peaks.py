"""What a chip can do at most: a measurement beyond it is a fault of the measurement."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Peak(NamedTuple):
    """The vendor's figures (NVIDIA's data sheets of the SXM modules)."""

    gflop_per_s: float  # dense bfloat16
    gb_per_s: float


PEAKS = {"H100": Peak(989.4e3, 3352.0), "H200": Peak(989.4e3, 4813.0)}


def beyond_peak(row: Mapping[str, Any], name: str | None) -> str | None:
    """Says which figures of a result exceed what the GPU of this name can do; None if none does, or it is unknown."""
    peak = next((peak for chip, peak in PEAKS.items() if chip in (name or "")), None)
    if peak is None:
        return None
    found = [f"{row[key]:g} {key} of {limit:g}" for key, limit in peak._asdict().items() if row.get(key, 0.0) > limit]
    return f"more than the chip can do: {', '.join(found)}" if found else None
