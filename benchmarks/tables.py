"""What every section of docs/performance.md is made of: results, Markdown tables, the machine."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
DOCS = Path(__file__).parent.parent / "docs"
Row = dict[str, Any]


def load(path: Path) -> tuple[dict[str, Any], list[Row]]:
    document = json.loads(path.read_text())
    return document["env"], document["rows"]


def table(columns: dict[str, str], rows: Iterable[Row]) -> str:
    """A Markdown table: ``columns`` maps a row's key to its heading; missing values are a dash."""
    lines = ["| " + " | ".join(columns.values()) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        values = (row.get(key) for key in columns)
        lines.append("| " + " | ".join("-" if v is None else f"{v}" for v in values) + " |")
    return "\n".join(lines) + "\n"


def with_mebibytes(row: Row) -> Row:
    peak = row.get("peak_extra_bytes")
    return {**row, "extra_mib": None if peak is None else f"{peak / 2**20:.0f}"}


def machine(env: dict[str, Any], path: Path) -> str:
    device = env.get("gpu", {}).get("name") if env.get("gpu") else env.get("cpu")
    where = f"{device}, {env.get('threads')} threads, torch {env.get('torch')}, commit {str(env.get('commit'))[:10]}"
    return f"Measured on {where} ([JSON](../{path.relative_to(DOCS.parent)})).\n"
