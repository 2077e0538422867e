"""A run of the parallel model of before there were other architectures loads, and goes on as it did then.

``parallel_checkpoint`` is step 2 of 4 of a tiny run, written by version 0.1.0 when "parallel" was its only variant.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from mtp_ext.train.checkpoint.directory import read_checkpoint
from mtp_ext.train.checkpoint.resume import check_same_run
from mtp_ext.train.checkpoint.saved_model import load_saved_model
from mtp_ext.train.config_file import read_config
from mtp_ext.train.report.record import read_metrics
from tests.train.tiny import run, write_corpus

CHECKPOINT = Path(__file__).parent / "parallel_checkpoint"


def test_it_loads_strictly_and_computes_the_same() -> None:
    model = load_saved_model(CHECKPOINT, torch.device("cpu")).model
    labels = torch.arange(24)[None]
    assert model(labels[:, :20], labels).head_loss.tolist() == pytest.approx(
        [5.530300140380859, 5.546345233917236], rel=1e-6
    )


def test_it_resumes_with_its_optimiser(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps 3 and 4 are those that the old version took."""
    monkeypatch.chdir(tmp_path)  # its paths are relative
    write_corpus(Path("corpus"))
    checkpoint = read_checkpoint(CHECKPOINT)
    assert checkpoint is not None
    saved = read_config(CHECKPOINT)
    config = dataclasses.replace(saved, max_steps=4, out=Path("again"))
    assert check_same_run(saved, config) == [f"out: {saved.out} -> again", "max_steps: 2 -> 4"]
    run(config, checkpoint)
    losses = {r["step"]: r["loss"] for r in read_metrics(Path("again/metrics.jsonl")) if r["kind"] == "train"}
    assert losses == pytest.approx({3: 11.094224691390991, 4: 11.10259222984314}, rel=1e-6)
