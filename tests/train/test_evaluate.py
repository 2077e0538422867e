"""Evaluation is the same every time, and on part of a split close to the whole."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from mtp_ext.cli.evaluate import run as evaluate_command
from mtp_ext.train.evaluation.evaluate import evaluate
from mtp_ext.train.report.record import read_metrics
from tests.train.tiny import CPU, run, tiny_config, tiny_dataset, tiny_model, write_corpus


def test_the_command_prints_the_numbers_of_the_last_validation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tiny_config(tmp_path, max_steps=3))
    recorded = list(read_metrics(tmp_path / "run" / "metrics.jsonl"))[-1]
    assert recorded["final"]
    assert evaluate_command(["--checkpoint", str(tmp_path / "run"), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    for name in ("loss", "head_loss", "nats_per_byte", "top1", "accept_length", "n_valid", "evaluated_tokens"):
        assert printed[name] == recorded[name], name


def test_the_table_shows_every_head(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tiny_config(tmp_path, max_steps=1))
    recorded = list(read_metrics(tmp_path / "run" / "metrics.jsonl"))[-1]
    evaluate_command(["--checkpoint", str(tmp_path / "run")])
    table = capsys.readouterr().out
    for loss, per_byte in zip(recorded["head_loss"], recorded["nats_per_byte"], strict=True):
        assert f"{loss:.4f}" in table and f"{per_byte:.4f}" in table
    assert f"{recorded['accept_length']:.2f} of 2 tokens" in table


def test_other_text_is_measured_in_the_models_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tiny_config(tmp_path, max_steps=1))
    other = write_corpus(tmp_path / "other", files=3, seed=9)
    evaluate_command(["--checkpoint", str(tmp_path / "run"), "--source", str(other), "--json"])
    printed = json.loads(capsys.readouterr().out)
    size = sum(path.stat().st_size for path in other.iterdir())
    assert printed["evaluated_tokens"] == size + 3  # every byte and a separator per file, without padding
    assert printed["n_valid"][0] == size  # each byte is a target but each file's first, and so is each separator


def test_a_changed_corpus_is_refused(tmp_path: Path) -> None:
    """Another validation split would give other numbers without a word."""
    run(tiny_config(tmp_path, max_steps=1))
    write_corpus(tmp_path / "corpus", seed=5)
    with pytest.raises(ValueError, match=r"cannot find the corpus of .* holds 12 documents .*; pass --source"):
        evaluate_command(["--checkpoint", str(tmp_path / "run")])


def test_a_limit_spreads_over_the_split(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    dataset = tiny_dataset(config)
    model = tiny_model(config, dataset)
    whole = evaluate(model, dataset, CPU, seq_len=24, batch_size=4)
    part = evaluate(model, dataset, CPU, seq_len=24, batch_size=4, batches=2)
    assert part.n_tokens == 2 * 4 * 24 < whole.n_tokens
    assert part.heads.head_loss == pytest.approx(whole.heads.head_loss, rel=0.02)
    assert part.heads.head_loss != whole.heads.head_loss


def test_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    dataset = tiny_dataset(config)
    model = tiny_model(config, dataset).train()
    evaluate(model, dataset, CPU, seq_len=24, batch_size=4, batches=1)
    assert model.training and all(p.grad is None for p in model.parameters())


def test_training_lowers_the_loss(tmp_path: Path) -> None:
    """Thirty steps on a corpus of one idiom: every head learns, the nearest best."""
    config = tiny_config(tmp_path, max_steps=30)
    before = evaluate(
        tiny_model(config, tiny_dataset(config)), tiny_dataset(config), CPU, seq_len=24, batch_size=4
    ).heads.head_loss
    outcome = run(dataclasses.replace(config, schedule=dataclasses.replace(config.schedule, warmup_steps=3)))
    assert outcome.evaluation is not None
    after = outcome.evaluation.heads.head_loss
    assert all(a < b - 0.5 for a, b in zip(after, before, strict=True))
