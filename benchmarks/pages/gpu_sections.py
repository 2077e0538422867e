"""The GPU sections of docs/results/performance.md: the loss against its targets, memory-bound passes, heads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from benchmarks.pages.tables import DOCS, Row, load, machine, table, with_mebibytes

# The design's minimum ratio to the bare GEMMs on a Hopper GPU, by width and vocabulary.
BARS = {(1024, 32000): 0.85, (4096, 32000): 0.95, (4096, 128256): 0.95, (8192, 128256): 0.96}

# The first columns of the loss tables.
SHAPE_AND_TIME = {"N": "N", "D": "D", "V": "V", "impl": "implementation", "ms_median": "ms"}


def measured(row: Row) -> Row:
    """Prepares a row for its table: adds the target ratio of its shape and the clock; an error replaces the time."""
    gpu: dict[str, Any] = row.get("gpu") or {}
    shown = with_mebibytes(row) | {"bar": BARS.get((row.get("D", 0), row.get("V", 0))), "mhz": gpu.get("sm_mhz_median")}
    if "error" in row:
        return shown | {"ms_median": row["error"].replace("|", "/")}
    if "gflop_per_s" in row:
        shown["tflop_per_s"] = f"{row['gflop_per_s'] / 1000:.0f}"
    process = gpu.get("process_bytes_max") or gpu.get("device_bytes_max")
    return shown | {"nvml_mib": None if process is None else f"{process / 2**20:.0f}"}


def ratio_picture(rows: Sequence[Row], target: Path) -> None:
    """Plots the ratio of the default chunk to the bare GEMMs, a group of bars per shape, with the target ratio."""
    ours = [r for r in rows if r["impl"] == "mtp_ext" and "baseline_ratio" in r]
    shapes = list(dict.fromkeys((r["D"], r["V"]) for r in ours))
    heads = sorted({r["n"] for r in ours})
    figure, axes = plt.subplots(figsize=(1.2 * max(5, len(shapes)), 3.8), layout="constrained")
    width = 0.8 / max(1, len(heads))
    for i, n in enumerate(heads):
        of_n = {(r["D"], r["V"]): r["baseline_ratio"] for r in ours if r["n"] == n}
        places = [(x + (i - (len(heads) - 1) / 2) * width, of_n[s]) for x, s in enumerate(shapes) if s in of_n]
        axes.bar([x for x, _ in places], [y for _, y in places], width, label=f"n = {n}")
    for x, shape in enumerate(shapes):
        if shape in BARS:
            axes.hlines(BARS[shape], x - 0.45, x + 0.45, colors="black", linestyles="dashed")
    axes.set_xticks(range(len(shapes)), [f"D = {d}\nV = {v}" for d, v in shapes], fontsize=8)
    axes.set_ylabel("ratio to the bare GEMMs")
    axes.set_ylim(0, 1.1)
    axes.grid(alpha=0.3, axis="y")
    if ours:
        figure.legend(frameon=False, loc="outside upper right", ncols=len(heads))
    figure.savefig(target, dpi=150)
    plt.close(figure)


def gpu_loss_section(path: Path) -> str:
    """Compares the loss with the bare GEMMs over widths, vocabularies, chunks and heads."""
    env, every = load(path)
    rows = [r for r in every if r["benchmark"] != "gpu_half_ignored"]
    bound = [r for r in every if r["benchmark"] == "gpu_half_ignored"]
    picture = DOCS / f"{path.stem}.png"
    ratio_picture(rows, picture)
    columns = {
        "D": "D",
        "V": "V",
        "n": "n",
        "impl": "implementation",
        "ms_median": "ms",
        "baseline_ratio": "ratio to `gemms`",
        "bar": "bar",
        "tflop_per_s": "TFLOP/s of 6NDV",
        "extra_mib": "extra MiB",
        "nvml_mib": "MiB by NVML",
        "mhz": "SM MHz",
    }
    dtype = "float32" if env.get("gpu") is None else "bfloat16"
    return (
        f"\n## The loss on a GPU: {path.stem}\n\n{machine(env, path)}\nN = {rows[0]['N']} rows of all heads, "
        f"{dtype}, forward and backward. Extra memory is what a call allocates beyond what stands before it; NVML's "
        "figure is the highest while the shape was timed, of the process, or of the device where it tells no more. The "
        f"dashed line is the bar of the design for a Hopper GPU.\n\n![Ratio to the bare GEMMs]({picture.name})\n\n"
        + table(columns, map(measured, rows))
        + (_bound_table(bound) if bound else "")
    )


def _bound_table(rows: Sequence[Row]) -> str:
    columns = {
        **SHAPE_AND_TIME,
        "baseline_ratio": "ratio to `every_row`",
        "extra_mib": "extra MiB",
    }
    return (
        "\nA target in every other row: all rows multiplied, or as many as the caller's `max_valid` says.\n\n"
        + table(columns, map(measured, rows))
    )


def row_pass_section(path: Path) -> str:
    """Compares the row kernel with a copy, and decoding with a read."""
    env, rows = load(path)
    passes = {"R": "rows", "V": "V", "impl": "implementation", "ms_median": "ms", "gb_per_s": "GB/s"}
    decoding = {"R": "rows", "D": "D", **{key: name for key, name in passes.items() if key != "R"}}
    found = {name: [measured(r) for r in rows if r["benchmark"] == name] for name in ("row_pass", "decode")}
    return (
        f"\n## The passes that memory bounds: {path.stem}\n\n{machine(env, path)}\nThe row kernel of the loss reads "
        "and writes the logits once, as the copy does.\n\n"
        + table(passes | {"baseline_ratio": "ratio to `copy`", "mhz": "SM MHz"}, found["row_pass"])
        + "\nDecoding reads the unembedding once, whatever the number of rows.\n\n"
        + table(decoding | {"baseline_ratio": "ratio to `read`", "mhz": "SM MHz"}, found["decode"])
    )


def heads_section(path: Path) -> str:
    """Compares heads on one trunk, one by one and together."""
    env, rows = load(path)
    columns = {"N": "N", "n": "n", "D": "D", "impl": "implementation", "ms_median": "ms"}
    linear = columns | {"baseline_ratio": "ratio to `separate`", "tflop_per_s": "TFLOP/s of 6NnDD", "mhz": "SM MHz"}
    norms = columns | {"baseline_ratio": "ratio to `torch`", "gb_per_s": "GB/s", "mhz": "SM MHz"}
    found = {name: [measured(r) for r in rows if r["benchmark"] == name] for name in ("linear_heads", "norm_heads")}
    return (
        f"\n## Heads that read one trunk: {path.stem}\n\n{machine(env, path)}\nForward and backward. Linear "
        "heads: a GEMM each, or one of their stacked parameters, the copies included.\n\n"
        + table(linear, found["linear_heads"])
        + "\nHeads that are a norm: a call each, or one that reads the trunk once.\n\n"
        + table(norms, found["norm_heads"])
    )


def peers_section(path: Path) -> str:
    """Compares the loss with other published losses."""
    env, rows = load(path)
    columns = {
        **SHAPE_AND_TIME,
        "baseline_ratio": "ratio to `gemms`",
        "tflop_per_s": "TFLOP/s of 6NDV",
        "extra_mib": "extra MiB",
        "loss_error": "loss against ours",
    }
    errors = ({"loss_error": f"{r['loss_error']:.1e}"} if "loss_error" in r else {} for r in rows)
    absent = "".join(f"- {name}: not measured ({reason})\n" for name, reason in env.get("absent", {}).items())
    return (
        f"\n## The loss on a GPU against its peers: {path.stem}\n\n{machine(env, path)}\n{rows[0]['dtype']}, "
        "forward and backward, each as its authors' defaults have it.\n\n"
        + table(columns, (measured(r) | e for r, e in zip(rows, errors, strict=True)))
        + (f"\n{absent}" if absent else "")
    )
