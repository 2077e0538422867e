"""``mtp evaluate``: measures a trained model on held-out text."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.console import Console

from mtp_ext.generate.measure import DecodingMeasurement
from mtp_ext.train.checkpoint.saved_model import TOKENIZER_DIRECTORY, SavedModel, find_dataset, load_saved_model
from mtp_ext.train.config import check_at_least
from mtp_ext.train.data import Dataset, prepare_data
from mtp_ext.train.device import choose_compute
from mtp_ext.train.evaluation.decoding import DecodeConfig, measure_on_split
from mtp_ext.train.evaluation.evaluate import evaluate
from mtp_ext.train.metrics import finite
from mtp_ext.train.report.plots import plot_acceptance
from mtp_ext.train.report.summary import accept_line, decoding_facts, decoding_table, evaluation_table, facts_table
from mtp_ext.train.run import default_cache


@dataclass(frozen=True)
class EvaluateCommand:
    """Measure a trained model: loss and top-1 of each head, accept length; tokens per forward, drafts accepted.

    By default on the validation split of its training, in the order and batches of the run's final validation, which
    gives the same numbers. Then continuations of the same text are decoded in float32, to see which drafts are
    accepted.
    """

    checkpoint: Path
    """Directory of a checkpoint, or of a run (its latest checkpoint)."""
    source: tuple[str, ...] | None = None
    """Measure on these files, directories or globs instead."""
    split: Literal["validation", "train"] = "validation"
    """Split of the training corpus to measure on, without --source."""
    batches: int = 0
    """Maximum number of batches, spread evenly over the split; 0 takes all."""
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    json: bool = False
    """Print the numbers as JSON."""
    out: Path | None = None
    """Also write evaluation.json, and acceptance.png if there are drafts, into this directory."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ..., or auto: a GPU if there is one."""
    precision: Literal["auto", "float32", "bfloat16"] | None = None
    """Precision of the matrix products (default: as in training)."""
    cache: Path | None = None
    """Directory of tokenised corpora (default: as in training)."""


def run(arguments: Sequence[str]) -> int:
    """Runs the command; returns the exit code."""
    command = tyro.cli(EvaluateCommand, args=list(arguments), prog="mtp evaluate")
    check_at_least(0, "", command, "batches")
    if command.out is not None:
        command.out.mkdir(parents=True, exist_ok=True)
    compute = choose_compute(command.device)
    saved = load_saved_model(command.checkpoint, compute.device)
    compute = choose_compute(command.device, command.precision or saved.config.precision)
    dataset = prepare(command, saved)
    evaluation = evaluate(
        saved.model,
        dataset,
        compute,
        seq_len=saved.config.batch.seq_len,
        batch_size=saved.config.evaluation.batch_size,
        batches=command.batches,
        split=command.split,
        schedule=saved.config.loss.schedule,
        head_weights=saved.config.loss.head_weights,
    )
    record: dict[str, Any] = {"checkpoint": str(saved.checkpoint.path), **evaluation.as_dict()}
    decoded = None
    if command.decode.prompts:
        decode = command.decode.fitted(saved.config.batch.seq_len)
        (decoded,) = measure_on_split(saved.model, dataset, command.split, decode)
        record["decoding"] = {**dataclasses.asdict(decode), **decoded.as_dict()}
    document = json.dumps(finite(record), indent=2)
    if command.out is not None:
        write(command.out, document, decoded)
    if command.json:
        print(document)
        return 0
    console = Console()
    title = f"{command.split} split".capitalize() if command.source is None else "Given source"
    console.print(evaluation_table(evaluation, title))
    facts = [accept_line(evaluation), ("tokens", f"{evaluation.n_tokens:,}")]
    console.print(facts_table([*facts, ("checkpoint", str(saved.checkpoint.path))]))
    if decoded is not None:
        if decoded.n_draft:
            how = "greedy" if command.decode.temperature == 0 else f"temperature {command.decode.temperature:g}"
            console.print(decoding_table(decoded, f"Decoding, {how}"))
        console.print(facts_table(decoding_facts(decoded)))
    return 0


def write(directory: Path, document: str, decoded: DecodingMeasurement | None) -> None:
    """Writes the numbers and the plot."""
    (directory / "evaluation.json").write_text(document + "\n", encoding="utf-8")
    if decoded is not None and decoded.n_draft:
        plot_acceptance(decoded, directory / "acceptance.png")


def prepare(command: EvaluateCommand, saved: SavedModel) -> Dataset:
    """Prepares the corpus to measure on, with the model's tokenizer.

    Raises:
        ValueError: The training corpus is gone, or has changed since the model was trained.
    """
    cache = command.cache or saved.config.cache or default_cache()
    if command.source is None:
        return find_dataset(saved.checkpoint, saved.config.data, cache, "pass --source to measure on other text")
    config = dataclasses.replace(
        saved.config.data,
        source=command.source,
        exclude=None,
        tokenizer=str(saved.checkpoint.path / TOKENIZER_DIRECTORY),
        validation_fraction=1.0 if command.split == "validation" else 0.0,
    )
    return prepare_data(config, cache)
