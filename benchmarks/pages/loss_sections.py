"""The sections of docs/results/performance.md about the fused loss."""

from __future__ import annotations

from pathlib import Path

from benchmarks.pages.tables import Row, load, machine, table, with_mebibytes


def loss_section(path: Path) -> str:
    """Compares the loss with the bare GEMMs and the peers."""
    env, rows = load(path)
    columns = {
        "N": "N",
        "D": "D",
        "V": "V",
        "dtype": "dtype",
        "impl": "implementation",
        "ms_median": "ms",
        "baseline_ratio": "ratio to `gemms`",
        "gflop_per_s": "GFLOP/s of 6NDV",
        "extra_mib": "extra MiB",
    }
    return f"\n## The loss, forward and backward: {path.stem}\n\n{machine(env, path)}\n" + table(
        columns, map(with_mebibytes, rows)
    )


def options_section(path: Path) -> str:
    """Tabulates the cost of each option."""
    env, rows = load(path)
    shape = rows[0]
    columns = {"impl": "option", "ms_median": "ms", "baseline_ratio": "ratio to `plain`", "extra_mib": "extra MiB"}
    return (
        f"\n## What the options of the loss cost\n\n{machine(env, path)}\nN = {shape['N']}, D = {shape['D']}, "
        f"V = {shape['V']}, {shape['dtype']}, forward and backward. The extra memory is that of a call: the chunk of "
        "logits and the two gradients.\n\n" + table(columns, map(with_mebibytes, rows))
    )


def sweep_section(path: Path) -> str:
    """Compares the loss with eager torch over a grid, and shows its growth with each size."""
    env, rows = load(path)
    grid = [r for r in rows if r["benchmark"] == "loss_sweep"]
    ours = {(r["N"], r["D"], r["V"]): r for r in grid if r["impl"] == "mtp_ext"}
    vocabularies = sorted({r["V"] for r in grid})
    lines: list[Row] = []
    for n_rows in sorted({r["N"] for r in grid}):
        for width in sorted({r["D"] for r in grid}):
            line: Row = {"N": n_rows, "D": width}
            for vocab in vocabularies:
                point = ours[n_rows, width, vocab]
                ratio = point.get("baseline_ratio")
                line[str(vocab)] = f"{point['ms_median']:.1f} ms, " + (f"{ratio:.2f}" if ratio else "eager has no room")
            lines.append(line)
    growth = [r for r in rows if r["benchmark"] == "loss_growth"]
    axes = {"N": "N", "V": "V", "n": "n"}
    growth_lines = [
        {"grows": r["grows"], "size": r[axes[r["grows"]]], "ms": f"{r['ms_median']:.1f}", "gflop": r["gflop_per_s"]}
        for r in growth
    ]
    columns = {"N": "N", "D": "D"} | {str(v): f"V = {v}" for v in vocabularies}
    return (
        f"\n## The loss against eager torch over sizes\n\n{machine(env, path)}\nfloat32, forward and backward: "
        "milliseconds of the fused loss, and how many times as fast as eager it is in the same round. A call costs "
        "about 0.03 ms more than eager's (its autograd Function is Python's), which shows at smaller sizes.\n\n"
        + table(columns, lines)
        + "\n### Growth\n\nOne size doubled at a time from n = 1, N = 1024 positions, V = 8192 (D = 256): the time "
        "is linear in each as far as the rate of the GEMMs stays, which falls by 15 % towards large V.\n\n"
        + table({"grows": "grows", "size": "to", "ms": "ms", "gflop": "GFLOP/s"}, growth_lines)
    )


def errors_section(path: Path) -> str:
    """Compares the errors with those of eager torch."""
    env, rows = load(path)
    keys = ("loss", "grad_hidden", "grad_weight")
    lines = [
        {"case": r["case"], "dtype": r["dtype"]}
        | {key: f"{r[f'{key}_ours']:.1e} ({r[f'{key}_eager']:.1e})" for key in keys}
        for r in rows
    ]
    columns = {"case": "case", "dtype": "dtype", "loss": "loss", "grad_hidden": "d hidden", "grad_weight": "d weight"}
    return (
        f"\n## Errors of the loss\n\n{machine(env, path)}\nThe largest error of a result relative to its largest "
        "value, against float64 on the same (rounded) inputs; in brackets that of eager torch in the same dtype.\n\n"
        + table(columns, lines)
    )


def before_after_section(path: Path) -> str:
    """Tabulates two versions of the package, each against a yardstick in its own process."""
    env, rows = load(path)
    lines: list[Row] = []
    for row in rows:
        gains = [b / a for b, a in zip(row["before_ratios"], row["after_ratios"], strict=True)]
        lines.append(
            row
            | {"before": f"{row['before_ratio']:.3f}", "after": f"{row['after_ratio']:.3f}"}
            | {name: f"{row[name]:.2f}" for name in ("before_ms", "after_ms")}
            | {"gain": f"{row['before_ratio'] / row['after_ratio']:.2f} ({min(gains):.2f}-{max(gains):.2f})"}
        )
    columns = {
        **{"case": "case, forward and backward", "before_ms": "ms before", "after_ms": "ms after"},
        **{"before": "of the yardstick, before", "after": "after", "gain": "gain (range over the rounds)"},
    }
    return (
        f"\n## Before and after: {path.stem.removeprefix('before_after_')}\n\n{machine(env, path)}\n"
        "Both versions were timed in turns, each case against its yardstick in the same process; a ratio below 1 is "
        "faster than the yardstick.\n\n" + table(columns, lines)
    )
