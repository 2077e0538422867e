"""The benchmarks of the architectures: equal parameters, no run twice, and tables that say what was measured."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.pages import variant_sections
from benchmarks.studies.train_variants import model_of
from benchmarks.suites.variants import PAPER_VARIANTS
from tests.train.tiny import write_corpus

ENV = {"cpu": "a CPU", "threads": 2, "torch": "2.13.0", "commit": "0123456789abcdef"}


@pytest.mark.parametrize("vocab_size", [257, 1024])
def test_the_five_models_have_equal_parameters_and_layers(vocab_size: int) -> None:
    models = [model_of(variant, vocab_size) for variant in PAPER_VARIANTS]
    totals = [m.parameter_counts()["total"] for m in models]
    assert max(totals) < 1.01 * min(totals)
    assert len({m.n_layers for m in models}) == 1


@pytest.mark.slow
def test_a_run_is_recorded_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command in this process; the run is a process of its own."""
    write_corpus(tmp_path / "corpus", files=40)
    options = ["--quick", "--out", str(tmp_path / "o.json"), "--cache", str(tmp_path / "cache"), "--threads", "1"]
    options += ["--variants", "anticausal", "--seeds", "0", "--source", str(tmp_path / "corpus")]
    threads = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # which the command sets
    monkeypatch.setattr(sys, "argv", ["train_variants", *options])
    try:
        for shown in (1, 0):
            runpy.run_module("benchmarks.studies.train_variants", run_name="__main__", alter_sys=True)
            assert capsys.readouterr().out.count("anticausal") == shown
    finally:
        torch.set_num_threads(threads)
    document = json.loads((tmp_path / "o.json").read_text())
    (row,) = document["rows"]
    assert (row["variant"], row["seed"], row["steps"]) == ("anticausal", 0, 3)
    assert len(row["head_loss"]) == 4 and row["accept_length"] >= 1.0 and row["peak_bytes"] > 50 << 20
    assert document["env"]["command"].startswith("python -m benchmarks.studies.train_variants --quick")


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text(json.dumps({"env": ENV, "rows": rows}))
    return path


def test_the_memory_table_has_the_slope_of_each_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(variant_sections, "DOCS", tmp_path)
    monkeypatch.setattr("benchmarks.pages.tables.DOCS", tmp_path / "docs")
    shape = {"B": 4, "S": 256, "D": 128, "V": 8192}
    rows = []
    for impl, per_head in (("sequential", 0), ("autograd", 3 << 20)):
        for n in (1, 4):
            peak = (50 << 20) + n * per_head
            rows.append(
                {"variant": "causal", "impl": impl, "n": n, **shape, "ms_median": 10.0 * n, "peak_extra_bytes": peak}
            )
    text = variant_sections.variants_section(written(tmp_path / "variants.json", rows))
    slopes = [line.split("|")[-2].strip() for line in text.splitlines() if line.startswith("| causal")][:2]
    assert slopes == ["0.0", "3.0"]
    assert (tmp_path / "variants.png").stat().st_size > 10_000


def test_the_training_table_shows_mean_and_spread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.pages.tables.DOCS", tmp_path / "docs")
    row = {"variant": "linear", "parameters": 3_050_000, "steps": 9, "tokens": 9216, "accept_length": 1.5}
    row |= {"tokens_per_second": 4000.0, "peak_bytes": 300 << 20}
    rows = [
        {**row, "seed": seed, "head_loss": [loss, 4.0], "first_head_loss": [3.4, 7.0]}
        for seed, loss in enumerate((3.0, 3.1, 3.5))
    ]
    text = variant_sections.training_section(written(tmp_path / "train_variants.json", rows))
    (line,) = [line for line in text.splitlines() if line.startswith("| linear")]
    assert "| 3.05 | 3.200 (3.000-3.500) | 4.000 (4.000-4.000) | 1.500 (1.500-1.500) | 4000" in line
    assert "In 2 of 3 runs every head ends below" in text
    assert "9 steps, 9,216 tokens" in text and "3 seeds" in text
