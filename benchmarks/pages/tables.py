"""Shared by all sections of docs/results/performance.md: results, Markdown tables, the machine line."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
DOCS = ROOT / "docs" / "results"
Row = dict[str, Any]


def load(path: Path) -> tuple[dict[str, Any], list[Row]]:
    document = json.loads(path.read_text())
    return document["env"], document["rows"]


def table(columns: dict[str, str], rows: Iterable[Row]) -> str:
    """Builds a Markdown table; ``columns`` maps row keys to headings, and missing values become a dash."""
    lines = ["| " + " | ".join(columns.values()) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        values = (row.get(key) for key in columns)
        lines.append("| " + " | ".join("-" if v is None else f"{v}" for v in values) + " |")
    return "\n".join(lines) + "\n"


def with_mebibytes(row: Row) -> Row:
    peak = row.get("peak_extra_bytes")
    return {**row, "extra_mib": None if peak is None else f"{peak / 2**20:.0f}"}


def machine(env: dict[str, Any], path: Path) -> str:
    gpu = env.get("gpu")
    device = f"{env.get('cpu')}, {env.get('threads')} threads"
    if gpu:
        device = f"{gpu.get('name')}, driver {gpu.get('driver') or 'unknown'}, CUDA {env.get('torch_cuda')}"
    changed = ", with uncommitted changes" if env.get("dirty") else ""
    where = f"{device}, torch {env.get('torch')}, commit {str(env.get('commit'))[:10]}{changed}"
    return f"Measured on {where} ([JSON]({os.path.relpath(path, DOCS)})).\n"


def on_gpu(env: dict[str, Any]) -> str:
    """Returns the suffix of a heading for GPU results."""
    return f" on {env['gpu'].get('name')}" if env.get("gpu") else ""
