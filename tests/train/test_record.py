"""What a run records: JSON lines, TensorBoard, pictures."""

from __future__ import annotations

import dataclasses
import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.image import imread
from rich.console import Console

from mtp_ext.ops import MultiTokenLoss
from mtp_ext.train.config import BatchConfig, EvaluationConfig, LoggingConfig
from mtp_ext.train.evaluation.evaluate import Evaluation
from mtp_ext.train.loop import describe
from mtp_ext.train.metrics import HeadTotals, memory_bytes
from mtp_ext.train.report import plots
from mtp_ext.train.report.plots import plot_run
from mtp_ext.train.report.record import MetricsWriter, read_metrics
from mtp_ext.train.report.summary import accept_line, evaluation_table
from tests.train.tiny import run, tiny_config

pytestmark = pytest.mark.slow


def loss_of(head_loss: list[float], n_valid: list[int], top1: list[float], accept: float) -> MultiTokenLoss:
    return MultiTokenLoss(
        torch.tensor(sum(head_loss)),
        torch.tensor(head_loss),
        torch.tensor(n_valid),
        torch.tensor(top1),
        torch.tensor(accept),
    )


def test_totals_are_means_over_targets() -> None:
    totals = HeadTotals((1.0, 0.5))
    totals.add(loss_of([2.0, 4.0], [30, 10], [0.5, 0.2], 1.5))
    totals.add(loss_of([1.0, 2.0], [10, 30], [0.25, 0.6], 1.1))
    metrics = totals.metrics()
    assert metrics.head_loss == pytest.approx([1.75, 2.5])
    assert metrics.top1 == pytest.approx([0.4375, 0.5])
    assert metrics.n_valid == [40, 40]
    assert metrics.loss == pytest.approx(1.75 + 0.5 * 2.5)
    assert metrics.accept_length == pytest.approx((1.5 * 10 + 1.1 * 30) / 40)


def test_heads_without_targets_have_no_numbers() -> None:
    totals = HeadTotals((1.0, 0.5))
    totals.add(loss_of([2.0, 0.0], [4, 0], [0.5, 0.0], 1.0))
    metrics = totals.metrics()
    assert (metrics.head_loss, metrics.top1, metrics.accept_length) == ([2.0, None], [0.5, None], None)
    assert metrics.loss == 2.0 and metrics.is_finite
    evaluation = Evaluation(metrics, bytes_per_token=2.0, n_tokens=4)
    assert evaluation.nats_per_byte == [1.0, None]
    assert accept_line(evaluation)[1].startswith("- of 2 tokens")
    assert describe(evaluation) == "validation 1.000 - nats/byte per head, accept length -"
    console = Console(file=io.StringIO(), width=80)
    console.print(evaluation_table(evaluation))
    (row,) = [line for line in console.file.getvalue().splitlines() if "t+2" in line]  # type: ignore[attr-defined]
    assert [cell.strip() for cell in row.split("│")[3:-1]] == ["-", "-", "-"]


def test_missing_and_infinite_numbers_are_null_in_json_and_gaps_in_plots(tmp_path: Path) -> None:
    values = {"tokens": 1, "head_loss": [1.0, None], "accept_length": None, "grad_norm": math.nan, "x": [math.inf, 2.0]}
    with MetricsWriter(tmp_path, tensorboard=True) as record:
        for kind in ("train", "train", "validation"):
            record.write(kind, 1, values)
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        read = json.loads(line, parse_constant=pytest.fail)
        assert (read["head_loss"], read["accept_length"], read["grad_norm"]) == ([1.0, None], None, None)
        assert read["x"] == [None, 2.0]
    assert len(plot_run(tmp_path)) == 2
    smoothed = plots._smoothed([1.0, None, 3.0])
    assert smoothed[0] == 1.0 and math.isnan(smoothed[1]) and smoothed[2] == 3.0


def test_documents_shorter_than_the_last_head_leave_it_without_numbers(tmp_path: Path) -> None:
    """In the record, the table and ``mtp evaluate --json``; a head of weight 0 has none while training either."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number in range(8):
        (corpus / f"{number}.txt").write_text("ab")
    config = tiny_config(tmp_path, max_steps=1, batch=BatchConfig(seq_len=8, batch_size=2))
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, n_future=3, n_layers=4))
    run(config)
    train, validation = read_metrics(tmp_path / "run" / "metrics.jsonl")
    for record in (train, validation):
        assert record["head_loss"][2] is None and record["top1"][2] is None and record["accept_length"] is None
        assert record["head_loss"][1] > 0
    assert validation["nats_per_byte"][2] is None
    weights = dataclasses.replace(config.loss, head_weights=(1.0, 0.0, 1.0))
    run(dataclasses.replace(config, loss=weights, out=tmp_path / "weights"))
    assert next(iter(read_metrics(tmp_path / "weights" / "metrics.jsonl")))["head_loss"][1] is None


def test_peak_memory_counts_what_was_allocated() -> None:
    before = memory_bytes(torch.device("cpu"))
    # As large as the peak so far: a small block can lie in what earlier tests freed, and lift no peak.
    block = torch.ones(before, dtype=torch.uint8)
    assert memory_bytes(torch.device("cpu")) > block.nbytes + (20 << 20)


def test_a_torn_last_line_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "train", "step": 1}\n{"kind": "train", "st')
    assert [r["step"] for r in read_metrics(path)] == [1]
    assert list(read_metrics(tmp_path / "absent")) == []


def test_resuming_drops_the_steps_that_are_taken_again(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, tensorboard=False) as record:
        for step in range(1, 6):
            record.write("train", step, {"loss": float(step)})
    with MetricsWriter(tmp_path, resumed_step=3, tensorboard=False) as record:
        record.write("train", 4, {"loss": 40.0})
    assert [r["loss"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [1.0, 2.0, 3.0, 40.0]


def test_every_record_is_complete(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, max_steps=5, evaluation=EvaluationConfig(every_steps=2, batches=1))
    run(config)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    train = [r for r in lines if r["kind"] == "train"]
    validation = [r for r in lines if r["kind"] == "validation"]
    assert [r["step"] for r in train] == [1, 2, 3, 4, 5]
    assert [(r["step"], r.get("final", False)) for r in validation] == [(2, False), (4, False), (5, True)]
    for r in train:
        assert r["tokens"] == r["step"] * 24 * 2 * 2
        assert r["loss"] == pytest.approx(sum(r["head_loss"]))
        assert r["memory_bytes"] > 50 << 20 and r["tokens_per_second"] > 0 and r["grad_norm"] > 0
        assert len(r["head_loss"]) == len(r["top1"]) == len(r["n_valid"]) == 2
        assert 1.0 <= r["accept_length"] <= 2.0
    for r in validation:
        assert r["nats_per_byte"][0] == pytest.approx(r["head_loss"][0] * tokens_per_byte(tmp_path), rel=1e-12)
    assert abs(train[0]["head_loss"][0] - math.log(257)) < 0.2


def tokens_per_byte(root: Path) -> float:
    """Of the validation split of bytes: a separator per file comes on top of the bytes."""
    (manifest,) = (root / "cache").glob("*/manifest.json")
    split: dict[str, Any] = json.loads(manifest.read_text())["splits"]["validation"]
    return float((split["bytes"] + split["documents"]) / split["bytes"])


def test_records_are_thinned_but_keep_the_first_and_the_last(tmp_path: Path) -> None:
    logging = LoggingConfig(every_steps=3, tensorboard=False, plots=False, sample_tokens=0)
    run(tiny_config(tmp_path, max_steps=7, logging=logging))
    steps = [r["step"] for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if r["kind"] == "train"]
    assert steps == [1, 3, 6, 7]


def test_tensorboard_holds_the_losses(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

    logging = LoggingConfig(every_steps=1, tensorboard=True, plots=False, sample_tokens=0)
    run(tiny_config(tmp_path, max_steps=3, logging=logging))
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    losses = events.Scalars("train/head_loss/head2")
    recorded = [r["head_loss"][1] for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if r["kind"] == "train"]
    assert [e.step for e in losses] == [1, 2, 3]
    assert [e.value for e in losses] == pytest.approx(recorded, rel=1e-6)


def test_plots_show_curves(tmp_path: Path) -> None:
    run(tiny_config(tmp_path, max_steps=6))
    paths = plot_run(tmp_path / "run")
    assert [p.name for p in paths] == ["loss.png", "accept_length.png"]
    for path in paths:
        image = imread(path)
        assert image.shape[0] >= 600 and image.shape[1] >= 1000
        coloured = (image[..., :3].max(-1) - image[..., :3].min(-1)) > 0.3
        assert coloured.sum() > 500  # lines in colour, not an empty frame


def test_no_records_no_plots(tmp_path: Path) -> None:
    assert plot_run(tmp_path) == []
