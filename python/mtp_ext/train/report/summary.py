"""The final report of a run: results, text sample and paths."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from mtp_ext.generate.measure import INTERVAL, DecodingMeasurement, Estimate
from mtp_ext.train.evaluation.evaluate import Evaluation
from mtp_ext.train.metrics import finite, shown
from mtp_ext.train.progress import Ending, Progress
from mtp_ext.train.report.display import format_duration
from mtp_ext.train.report.record import METRICS_FILE
from mtp_ext.train.report.sample import HeldOut

SUMMARY_FILE = "summary.json"


def evaluation_table(evaluation: Evaluation, title: str = "Validation") -> Table:
    """Builds a table of loss and top-1 of each head."""
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("head")
    table.add_column("predicts")
    for name in ("loss\n(nats/token)", "loss\n(nats/byte)", "top-1"):
        table.add_column(name, justify="right")
    heads = evaluation.heads
    for k, (loss, per_byte, top1) in enumerate(
        zip(heads.head_loss, evaluation.nats_per_byte, heads.top1, strict=True), start=1
    ):
        table.add_row(str(k), f"token t+{k}", shown(loss, ".4f"), shown(per_byte, ".4f"), shown(top1, ".1%"))
    return table


def accept_line(evaluation: Evaluation) -> tuple[str, str]:
    """Returns label and value of the accept length."""
    n = len(evaluation.heads.head_loss)
    return "accept length", f"{shown(evaluation.heads.accept_length, '.2f')} of {n} tokens per self-speculative step"


def decoding_table(measured: DecodingMeasurement, title: str) -> Table:
    """Builds a table of how often each draft was accepted."""
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("draft")
    for name in ("accepted", "accepted after\nthose before"):
        table.add_column(name, justify="right")
    rates = zip(measured.acceptance_per_position, measured.conditional_acceptance, strict=True)
    for position, row in enumerate(rates, start=1):
        table.add_row(str(position), *(with_interval(rate, ".1%") for rate in row))
    return table


def decoding_facts(measured: DecodingMeasurement) -> list[tuple[str, str]]:
    """Returns labels and values of the tokens per forward and of what they were measured on."""
    n_tokens = sum(row.n_tokens for row in measured.rows)
    return [
        ("tokens/forward", f"{with_interval(measured.tokens_per_forward, '.2f')} of {1 + measured.n_draft}"),
        ("decoded", f"{n_tokens:,} tokens after {len(measured.rows)} prompts"),
        ("intervals", INTERVAL),
    ]


def comparison_facts(plain: DecodingMeasurement, drafted: DecodingMeasurement) -> list[tuple[str, str]]:
    """Returns labels and values of what drafts changed: the speed, and not the text."""
    faster = shown(finite(drafted.tokens_per_second / plain.tokens_per_second), ".2f")
    length = shown(finite(drafted.tokens_per_forward.value), ".2f")
    same = f"{drafted.same_texts(plain)} of {len(plain.rows)}"
    return [
        ("with drafts", f"{length} tokens per forward, {faster} times as fast as without"),
        ("greedy text", f"the same with and without drafts for {same} held-out prompts"),
    ]


def with_interval(rate: Estimate, form: str) -> str:
    """Formats an estimate, and its interval if there is one."""
    value, low, high = (shown(finite(number), form) for number in rate)
    return f"{value} ({low} to {high})" if math.isfinite(rate.low) else value


def write_summary(
    directory: Path,
    ending: Ending,
    progress: Progress,
    evaluation: Evaluation | None,
    decoding: Sequence[DecodingMeasurement],
) -> None:
    """Writes what the end of a run shows into its `summary.json`."""
    record = {
        **progress.state_dict(),
        "tokens_per_second": ending.tokens_per_second,
        "memory_bytes": ending.memory_bytes,
        "validation": None if evaluation is None else evaluation.as_dict(),
        "decoding": [{**m.as_dict(), "same_texts": m.same_texts(decoding[0])} for m in decoding],
    }
    text = json.dumps(finite(record), indent=2, allow_nan=False)
    (directory / SUMMARY_FILE).write_text(text + "\n", encoding="utf-8")


def facts_table(facts: list[tuple[str, str]]) -> Table:
    """Builds a table of labels and values without lines."""
    table = Table.grid(padding=(0, 2))
    for label, value in facts:
        table.add_row(Text(label, style="bold"), Text(value))
    return table


def run_facts(ending: Ending, progress: Progress, epochs: float, device: str) -> list[tuple[str, str]]:
    """Returns labels and values of a run's speed, memory and length."""
    memory = "peak GPU memory" if "CPU" not in device else "peak memory"
    return [
        ("speed", f"{ending.tokens_per_second:,.0f} tokens per second"),
        (memory, f"{ending.memory_bytes / 2**20:,.0f} MiB"),
        (
            "trained",
            f"{progress.step:,} steps, {progress.tokens:,} tokens, {epochs:.2f} epochs in "
            f"{format_duration(progress.seconds)}",
        ),
        ("on", device),
    ]


def sample_panel(held_out: HeldOut, continuation: str) -> RenderableType:
    """Builds panels of the model's continuation and the source's own, each after the prompt."""

    def panel(title: str, rest: str, style: str) -> Panel:
        return Panel(
            Text.assemble((held_out.prompt, "dim"), (rest.rstrip("\n"), style)), title=title, title_align="left"
        )

    return Group(
        panel(f"The model continues {held_out.name} (held out; the prompt is dim)", continuation, "green"),
        panel("The source itself", held_out.rest, ""),
    )


def print_paths(console: Console, checkpoint: Path, plots: list[Path], run: Path) -> None:
    """Prints the paths of the results, one per line, and a command to try."""
    lines = [("checkpoint", checkpoint), *(("plot", plot) for plot in plots), ("records", run / METRICS_FILE)]
    lines.append(("summary", run / SUMMARY_FILE))
    for label, path in lines:
        console.print(f"{label:<11}{path}", highlight=False, markup=False, soft_wrap=True)
    console.print(
        f'{"try":<11}mtp generate --checkpoint {run} --prompt "def "', highlight=False, markup=False, soft_wrap=True
    )
