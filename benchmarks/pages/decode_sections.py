"""The section of docs/results/performance.md on decoding, beside the paper's figures; `make decode-demo` prints it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt

from benchmarks.pages.tables import DOCS, Row, load, machine, on_gpu, table
from benchmarks.pages.variant_sections import names_in
from mtp_ext.train.metrics import shown

# Gloeckle et al. 2024: relative speed and tokens per forward of 7 B parameters, by heads used.
PAPER = {
    "bytes": {"bytes (S3)": {1: (1.0, 1.0), 2: (1.94, 1.98), 4: (3.67, 3.84), 8: (6.39, 7.04)}},
    "tokens": {
        "code (S2)": {1: (1.0, 1.0), 2: (1.85, 1.94), 3: (2.54, 2.78), 4: (3.05, 3.50)},
        "Wikipedia (S2)": {1: (1.0, 1.0), 4: (2.74, 3.12)},
        "books (S2)": {1: (1.0, 1.0), 4: (2.67, 3.09)},
    },
}
TITLES = {"bytes": "Bytes, n = 8 (the paper's table S3)", "tokens": "Tokens, n = 4 (the paper's table S2)"}


def picture(rows: Sequence[Row], target: Path) -> None:
    """Plots tokens per forward against heads: a panel per model, a line per text, and the paper's."""
    models = names_in(rows, "model")
    figure, panels = plt.subplots(1, len(models), figsize=(4.8 * len(models), 3.8), squeeze=False, layout="constrained")
    for model, axes in zip(models, panels[0], strict=True):
        for text in names_in(rows, "text"):
            points = [r for r in rows if (r["model"], r["text"]) == (model, text)]
            rates = [r["tokens_per_forward"] for r in points if r["tokens_per_forward"]["low"] is not None]
            heads = [r["heads"] for r in points if r["tokens_per_forward"]["low"] is not None]
            errors = [
                [max(0.0, r["value"] - r["low"]) for r in rates],
                [max(0.0, r["high"] - r["value"]) for r in rates],
            ]
            axes.errorbar(heads, [r["value"] for r in rates], errors, marker="o", markersize=4, capsize=2, label=text)
        for text, figures in PAPER[model].items():
            axes.plot(list(figures), [length for _, length in figures.values()], "x:", label=f"paper, 7 B: {text}")
        axes.set_title(TITLES[model], fontsize=10)
        axes.set_xlabel("heads used")
        axes.set_xticks(sorted({r["heads"] for r in rows if r["model"] == model}))
        axes.set_ylabel("tokens per forward")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(target, dpi=150)
    plt.close(figure)


def cell(row: Row) -> str:
    """Formats relative speed, tokens per forward and its interval."""
    value, low, high = (shown(row["tokens_per_forward"][key], ".2f") for key in ("value", "low", "high"))
    interval = "" if low in ("-", high) else f" ({low} to {high})"
    return f"{shown(row['speed'], '.2f')} / {value}{interval}"


def demo_table(model: str, rows: Sequence[Row]) -> str:
    """Builds one model's table, by heads used, and says what the model is."""
    texts, paper = names_in(rows, "text"), PAPER[model]
    lines = []
    for heads in sorted({r["heads"] for r in rows}):
        ours = {r["text"]: cell(r) for r in rows if r["heads"] == heads}
        known = {name: figures[heads] for name, figures in paper.items() if heads in figures}
        lines.append({"heads": heads, **ours, **{name: f"{s:.2f} / {t:.2f}" for name, (s, t) in known.items()}})
    columns = {"heads": "heads used", **{text: text for text in texts}, **{name: f"7 B: {name}" for name in paper}}
    first, most = rows[0], [r for r in rows if r["heads"] == rows[0]["n_future"]]
    shares = [r["speed"] / r["tokens_per_forward"]["value"] for r in most if r["speed"] is not None]
    figures = next(iter(paper.values()))
    theirs = figures[max(figures)][0] / figures[max(figures)][1]
    same, n = sum(r["same_texts"] for r in rows), sum(r["n_prompts"] for r in rows)
    return (
        f"\n### {TITLES[model]}\n\n{first['parameters'] / 1e6:.1f} M parameters ({first['variant']}, "
        f"D = {first['d_model']}, {first['n_trunk_layers']} trunk layers), {first['step']:,} steps, "
        f"{first['tokens']:,} tokens of the standard library in {first['seconds'] / 60:.1f} minutes. "
        f"{sum(r['n_prompts'] for r in most)} prompts, one at a time, greedy, float32; in {same} of {n} continuations "
        f"the text is that of one head. Speed over tokens per forward with all heads is "
        f"{shown(statistics.fmean(shares) if shares else None, '.2f')} (paper: {theirs:.2f}).\n\n"
        + table(columns, lines)
    )


def demo_section(path: Path, pictures: Path = DOCS) -> str:
    """Shows relative speed and tokens per forward on unseen packages, by heads used, beside the paper's."""
    env, rows = load(path)
    target = pictures / f"{path.stem}.png"
    picture(rows, target)
    tables = [demo_table(model, [r for r in rows if r["model"] == model]) for model in names_in(rows, "model")]
    return (
        f"\n## Decoding with drafts{on_gpu(env)}\n\n{machine(env, path)}\n"
        "Relative speed / tokens per forward (95 % interval over prompts) on Python packages that were not trained on. "
        "Models of this size, trained for minutes, show that trained heads draft what head 1 then says on unseen text, "
        "that the text stays the same, and what of it arrives as wall clock on this machine. They say nothing of the "
        "acceptance of a large model; the paper's figures, of 7 B parameters, are there for the shape.\n\n"
        f"![Tokens per forward against heads used]({target.name})\n" + "".join(tables)
    )


def rounds_section(path: Path) -> str:
    """Shows the time of a round by drafts: what of the tokens per forward arrives as wall clock."""
    env, rows = load(path)
    lines = [
        {
            **{key: r[key] for key in ("variant", "n_layers", "dtype", "batch")},
            "ms": shown(1e3 * r["seconds_per_round"], ".2f"),
            **{f"{other['n_draft']}": shown(other["speed_per_token"], ".2f") for other in of_model(r, rows)},
        }
        for r in rows
        if r["n_draft"] == 0
    ]
    most = max(r["n_draft"] for r in rows)
    columns = {"variant": "heads", "n_layers": "layers with the heads'", "dtype": "dtype", "batch": "prompts"}
    drafts = {f"{k}": f"{k} draft{'s' * (k > 1)}" for k in range(1, most + 1)}
    return (
        f"\n## Rounds of decoding{on_gpu(env)}\n\n{machine(env, path)}\n"
        "The time of a round without drafts (ms), and over it that of a round with drafts: the speed per token per "
        "forward, 1 if drafts were free. A head with a layer cannot do better than (L + 1) / (L + n) on a trunk of L "
        "layers where a round waits for the weights; with 8 prompts and 3 drafts, 32 rows wait for the arithmetic.\n\n"
        + table({**columns, "ms": "ms, no drafts", **drafts}, lines)
    )


def of_model(row: Row, rows: Sequence[Row]) -> list[Row]:
    """The rows of the same model, dtype and batch with drafts."""
    keys = ("variant", "n_layers", "vocab_size", "dtype", "batch")
    return [r for r in rows if r["n_draft"] > 0 and all(r[key] == row[key] for key in keys)]
