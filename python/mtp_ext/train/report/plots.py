"""Plots: losses and accept length of a run over its tokens; how often drafts are accepted, and what they cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MultipleLocator

from mtp_ext.generate.measure import DecodingMeasurement
from mtp_ext.train.report.record import METRICS_FILE, read_metrics

SIZE_INCHES, DPI = (8.0, 5.0), 150
SMOOTHED_POINTS = 60  # average over about 1/60 of the run, because single steps are noisy
# The colour-blind-safe palette of Okabe and Ito.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442", "#000000")


def plot_run(directory: Path) -> list[Path]:
    """Draws `loss.png` and `accept_length.png` from a run's records into its directory.

    Returns:
        The files; empty without records.
    """
    records = list(read_metrics(directory / METRICS_FILE))
    train = [r for r in records if r["kind"] == "train"]
    validation = [r for r in records if r["kind"] == "validation"]
    if not train:
        return []
    figures = {"loss.png": _losses(train, validation), "accept_length.png": _accept_length(train, validation)}
    for name, figure in figures.items():
        figure.savefig(directory / name, dpi=DPI)
    return [directory / name for name in figures]


def plot_acceptance(measured: DecodingMeasurement, path: Path) -> None:
    """Draws how often each draft was accepted, with the intervals, into a PNG file."""
    value = measured.tokens_per_forward.value
    figure, axes = _axes(
        f"Drafts accepted on held-out text: {value:.2f} tokens per forward", "fraction accepted", "draft"
    )
    series = {
        "of all rounds": measured.acceptance_per_position,
        "of the rounds that accepted those before it": measured.conditional_acceptance,
    }
    for shift, colour, (label, rates) in zip((-0.03, 0.03), COLOURS, series.items(), strict=False):
        x = [position + shift for position in range(1, 1 + len(rates))]  # apart: the first points coincide
        errors = [[max(0.0, r.value - r.low) for r in rates], [max(0.0, r.high - r.value) for r in rates]]
        axes.errorbar(x, [r.value for r in rates], errors, color=colour, marker="o", capsize=3, label=label)
    axes.xaxis.set_major_locator(MultipleLocator(1))
    axes.set_ylim(0.0, 1.0)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=DPI)


def plot_round_cost(shares: Mapping[str, Sequence[float]], path: Path) -> None:
    """Draws what drafts cost into a PNG file.

    Args:
        shares: By label, the time of a round without drafts over one with 0, 1, ... drafts.
        path: The file.
    """
    figure, axes = _axes("What of the tokens per forward arrives as speed", "speed / tokens per forward", "drafts")
    for colour, (label, values) in zip(cycle(COLOURS), shares.items(), strict=False):
        axes.plot(range(len(values)), values, color=colour, marker="o", label=label)
    axes.xaxis.set_major_locator(MultipleLocator(1))
    axes.set_ylim(bottom=0.0)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=DPI)


def _losses(train: list[dict[str, Any]], validation: list[dict[str, Any]]) -> Figure:
    figure, axes = _axes("Loss of each head", "loss (nats per token)")
    for k in range(len(train[0]["head_loss"])):
        colour = COLOURS[k % len(COLOURS)]
        ran = [r for r in train if r.get("head_weights", r["head_loss"])[k] != 0]  # a head of weight 0 has no loss
        y = _smoothed([r["head_loss"][k] for r in ran])
        axes.plot(_tokens(ran), y, color=colour, linewidth=1.2, label=f"head {k + 1} (token t+{k + 1})")
        if validation:
            y = _gaps([r["head_loss"][k] for r in validation])
            axes.plot(_tokens(validation), y, color=colour, linestyle="none", marker="o", markersize=5, mec="white")
    if validation:
        axes.plot([], [], color="0.4", linestyle="none", marker="o", markersize=5, label="validation")
    axes.legend(frameon=False)
    return figure


def _accept_length(train: list[dict[str, Any]], validation: list[dict[str, Any]]) -> Figure:
    n = len(train[0]["head_loss"])
    figure, axes = _axes("Accept length of self-speculative decoding", f"tokens per step (of at most {n})")
    y = _smoothed([r["accept_length"] for r in train])
    axes.plot(_tokens(train), y, color=COLOURS[0], linewidth=1.2, label="training")
    if validation:
        y = _gaps([r["accept_length"] for r in validation])
        axes.plot(_tokens(validation), y, color=COLOURS[1], linestyle="none", marker="o", label="validation")
    axes.set_ylim(bottom=1.0)
    axes.legend(frameon=False)
    return figure


def _axes(title: str, y_label: str, x_label: str = "tokens trained on") -> tuple[Figure, Axes]:
    figure = Figure(figsize=SIZE_INCHES, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, loc="left")
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _tokens(records: Sequence[dict[str, Any]]) -> list[int]:
    return [r["tokens"] for r in records]


def _smoothed(values: Sequence[float | None]) -> list[float]:
    """Averages over a centred window, truncated at the ends; NaN where a value is missing."""
    half = len(values) // (2 * SMOOTHED_POINTS)
    means = []
    for i, value in enumerate(values):
        window = [v for v in values[max(0, i - half) : i + half + 1] if v is not None]
        means.append(math.nan if value is None else sum(window) / len(window))
    return means


def _gaps(values: Sequence[float | None]) -> list[float]:
    """Returns values with NaN, which is not drawn, for those that are missing."""
    return [math.nan if value is None else value for value in values]
