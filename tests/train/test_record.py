"""What a run records: JSON lines, TensorBoard, pictures."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.image import imread

from mtp_ext.ops import MultiTokenLoss
from mtp_ext.train.config import EvaluationConfig, LoggingConfig
from mtp_ext.train.metrics import HeadTotals, memory_bytes
from mtp_ext.train.report.plots import plot_run
from mtp_ext.train.report.record import MetricsWriter, read_metrics
from tests.train.tiny import run, tiny_config


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


def test_heads_without_targets_are_zero_not_nan() -> None:
    totals = HeadTotals()
    totals.add(loss_of([0.0, 0.0], [0, 0], [0.0, 0.0], 1.0))
    metrics = totals.metrics()
    assert (metrics.head_loss, metrics.top1, metrics.accept_length) == ([0.0, 0.0], [0.0, 0.0], 1.0)
    assert metrics.is_finite


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
        assert r["tokens"] == r["step"] * config.tokens_per_step
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
