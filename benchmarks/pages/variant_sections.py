"""The architecture sections of docs/results/performance.md: memory and time of a step, and trained models."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt

from benchmarks.pages.tables import DOCS, Row, load, machine, on_gpu, table

MEBIBYTE = 2**20
STYLES = {
    "autograd": ("plain torch, all logits", "o-"),
    "joint": ("joint, fused loss", "s-"),
    "sequential": ("sequential, fused loss", "^-"),
    "sequential, recompute": ("sequential, heads run again", "v--"),
}


def names_in(rows: Sequence[Row], key: str) -> list[str]:
    """Returns the distinct values of a key in row order."""
    return list(dict.fromkeys(row[key] for row in rows))


def memory_picture(rows: Sequence[Row], target: Path) -> None:
    """Plots the peak memory of a step against n: a panel per architecture, a line per schedule."""
    variants = names_in(rows, "variant")
    figure, panels = plt.subplots(
        1, len(variants), figsize=(3.2 * len(variants), 3.6), sharey=True, squeeze=False, layout="constrained"
    )
    for variant, axes in zip(variants, panels[0], strict=True):
        for impl, (label, style) in STYLES.items():
            points = sorted(
                (r["n"], r["peak_extra_bytes"] / MEBIBYTE)
                for r in rows
                if r["variant"] == variant and r["impl"] == impl and r["peak_extra_bytes"] is not None
            )
            if points:
                axes.plot(*zip(*points, strict=True), style, label=label, markersize=4)
        axes.set_title(variant, fontsize=10)
        axes.set_xlabel("predicted tokens n")
        axes.set_xticks(sorted({r["n"] for r in rows}))
        axes.set_yscale("log", base=2)
        axes.grid(alpha=0.3)
    panels[0][0].set_ylabel("peak memory of one step, MiB")
    handles, labels = max((axes.get_legend_handles_labels() for axes in panels[0]), key=lambda found: len(found[0]))
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.savefig(target, dpi=150)
    plt.close(figure)


def head_slope(rows: Sequence[Row]) -> float | None:
    """Returns MiB per head between the fewest and the most heads.

    Excludes the gradients of the heads' parameters: a step first frees as many bytes from the previous step.
    """
    known = [r for r in rows if r["peak_extra_bytes"] is not None]
    if len({r["n"] for r in known}) < 2:
        return None
    low, high = min(known, key=lambda r: r["n"]), max(known, key=lambda r: r["n"])
    slope: float = (high["peak_extra_bytes"] - low["peak_extra_bytes"]) / (high["n"] - low["n"]) / MEBIBYTE
    return slope


def grouped(rows: Sequence[Row]) -> list[list[Row]]:
    """Groups the rows by architecture and schedule."""
    keys = dict.fromkeys((r["variant"], r["impl"]) for r in rows)
    return [[r for r in rows if (r["variant"], r["impl"]) == key] for key in keys]


def variants_section(path: Path) -> str:
    """Shows memory and time of a step against n."""
    env, rows = load(path)
    picture = DOCS / f"{path.stem}.png"
    memory_picture(rows, picture)
    shape, sizes = rows[0], sorted({r["n"] for r in rows})
    state = shape["B"] * shape["S"] * shape["D"] * 4 / MEBIBYTE
    logits = shape["B"] * shape["S"] * shape["V"] * 4 / MEBIBYTE
    memory, time = [], []
    for group in grouped(rows):
        name = {"variant": group[0]["variant"], "impl": group[0]["impl"]}
        by_n = {r["n"]: r for r in group}
        peaks = {n: by_n[n]["peak_extra_bytes"] for n in by_n}
        slope = head_slope(group)
        memory.append(
            name
            | {str(n): None if peak is None else f"{peak / MEBIBYTE:.1f}" for n, peak in peaks.items()}
            | {"slope": None if slope is None else f"{slope:.1f}"}
        )
        time.append(
            name | {str(n): f"{r['ms_median']:.0f} ({r.get('baseline_ratio', 1):.2f})" for n, r in by_n.items()}
        )
    heads = {str(n): f"n = {n}" for n in sizes}
    names = {"variant": "variant", "impl": "schedule"}
    return (
        f"\n## The architectures: memory of a training step{on_gpu(env)}\n\n{machine(env, path)}\n"
        f"B·S = {shape['B'] * shape['S']}, D = {shape['D']}, V = {shape['V']}, float32. MiB that a step adds to what "
        "was there before it (of which the gradients of the step before are freed). One hidden state of all positions, "
        f"B·S·D, is {state:.2f} MiB; the logits of one head, B·S·V, are {logits:.0f} MiB.\n\n"
        f"![Peak memory against n]({picture.name})\n\n"
        + table(names | heads | {"slope": "per head"}, memory)
        + "\n### Time of the same steps\n\nMilliseconds, and in brackets how many times as fast as plain autograd in "
        "the same round.\n\n" + table(names | heads, time)
    )


def spread(values: Sequence[float], digits: int) -> str:
    """Formats values as ``mean (lowest-highest)``."""
    return f"{statistics.fmean(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def training_section(path: Path) -> str:
    """Compares the trained architectures."""
    env, rows = load(path)
    lines = []
    for variant in names_in(rows, "variant"):
        runs = [r for r in rows if r["variant"] == variant]
        n_heads = len(runs[0]["head_loss"])
        lines.append(
            {
                "variant": variant,
                "parameters": f"{runs[0]['parameters'] / 1e6:.2f}",
                **{f"head{k}": spread([r["head_loss"][k] for r in runs], 3) for k in range(n_heads)},
                "accept": spread([r["accept_length"] for r in runs], 3),
                "speed": spread([r["tokens_per_second"] for r in runs], 0),
                "memory": spread([r["peak_bytes"] / MEBIBYTE for r in runs], 0),
            }
        )
    heads = {f"head{k}": f"loss, head {k + 1}" for k in range(len(rows[0]["head_loss"]))}
    columns = {"variant": "variant", "parameters": "M parameters", **heads, "accept": "accept length"}
    columns |= {"speed": "tokens/s", "memory": "peak MiB"}
    seeds, tokens = len({r["seed"] for r in rows}), rows[0]["tokens"]
    fell = sum(all(b < a for a, b in zip(r["first_head_loss"], r["head_loss"], strict=True)) for r in rows)
    return (
        f"\n## The architectures: trained alike\n\n{machine(env, path)}\n"
        f"{rows[0]['steps']} steps, {tokens:,} tokens of the standard library's source, {seeds} seeds: mean "
        "(lowest-highest). Validation loss in nats per token; accept length is the mean number of tokens of a "
        f"self-speculative step. In {fell} of {len(rows)} runs every head ends below its first step's loss. "
        "Models of this size and runs of this length show that every architecture trains, and nothing about which is "
        "better: the paper's comparison (table S4) is of 7 B parameters.\n\n" + table(columns, lines)
    )
