"""One step: micro-batches add up to the batch, and nothing moves on a loss that is not finite."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from mtp_ext.nn import MTPModel
from mtp_ext.ops import MultiTokenLoss
from mtp_ext.train.config import BatchConfig, OptimConfig
from mtp_ext.train.data import Batch, TrainingStream
from mtp_ext.train.optim import Optimizers
from mtp_ext.train.report.record import read_metrics
from mtp_ext.train.run import train
from mtp_ext.train.step import NotFiniteError, head_weights, targets_of_heads, train_step
from tests.train.tiny import CPU, tiny_config, tiny_dataset, tiny_model


def whole_batch(root: Path, rows: int) -> Batch:
    """Rows that differ in their numbers of targets: documents end in some of them, and the split ends in one."""
    config = tiny_config(root)
    stream = TrainingStream(tiny_dataset(config), "train", 24, 2, rows, seed=3)
    batch = next(stream)
    batch.labels[0, 5:] = -100
    return batch


def fresh(root: Path) -> MTPModel:
    config = tiny_config(root)
    return tiny_model(config, tiny_dataset(config)).double()


def parts(batch: Batch, size: int) -> list[Batch]:
    chunks = [torch.split(t, size) for t in batch]
    return [Batch(*members) for members in zip(*chunks, strict=True)]


@pytest.mark.parametrize("weights", [None, (1.0, 0.25)])
@pytest.mark.parametrize("schedule", ["sequential", "joint", "autograd"])
def test_accumulated_gradients_equal_those_of_one_large_batch(
    tmp_path: Path, weights: tuple[float, ...] | None, schedule: str
) -> None:
    """Unequal micro-batches: a mean of means would be wrong here."""
    batch = whole_batch(tmp_path, 8)
    gradients = []
    for batches in ([batch], parts(batch, 3)):
        model = fresh(tmp_path)
        shares = head_weights([targets_of_heads(part, 2) for part in batches], weights)
        for part, share in zip(batches, shares, strict=True):
            result = model(part.tokens, part.labels, part.document_ids, head_weights=share, schedule=schedule)
            assert isinstance(result, MultiTokenLoss)
            result.loss.backward()  # type: ignore[no-untyped-call]
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        assert a is not None and b is not None
        assert (a - b).abs().max() <= 1e-12 * a.abs().max()


def test_a_step_reports_what_one_large_batch_would(tmp_path: Path) -> None:
    batch, results = whole_batch(tmp_path, 8), []
    for batches in ([batch], parts(batch, 3)):
        model = fresh(tmp_path)
        results.append(
            train_step(model, Optimizers(model, OptimConfig()), batches, CPU, "sequential", 1.0, (1.0, 0.25))
        )
    whole, summed = results
    assert summed.grad_norm == pytest.approx(whole.grad_norm, rel=1e-12)
    assert summed.heads.loss == pytest.approx(whole.heads.loss, rel=1e-12)
    assert summed.heads.head_loss == pytest.approx(whole.heads.head_loss, rel=1e-12)
    assert summed.heads.top1 == pytest.approx(whole.heads.top1, rel=1e-6)  # float32 fractions
    assert summed.heads.n_valid == whole.heads.n_valid
    assert whole.heads.loss == pytest.approx(whole.heads.head_loss[0] + 0.25 * whole.heads.head_loss[1], rel=1e-12)


def test_targets_are_counted_as_the_loss_counts_them(tmp_path: Path) -> None:
    batch, model = whole_batch(tmp_path, 8), fresh(tmp_path)
    result = model(batch.tokens, labels=batch.labels, document_ids=batch.document_ids)
    assert isinstance(result, MultiTokenLoss)
    assert targets_of_heads(batch, 2) == result.n_valid.tolist()
    assert result.n_valid[1] < result.n_valid[0] < batch.tokens.numel()


def test_a_loss_that_is_not_finite_updates_nothing(tmp_path: Path) -> None:
    batch, model = whole_batch(tmp_path, 4), fresh(tmp_path)
    with torch.no_grad():
        model.unembed.weight[3, 0] = float("inf")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(NotFiniteError, match="the loss is not finite"):
        train_step(model, Optimizers(model, OptimConfig()), [batch], CPU, "sequential", 1.0, (1.0, 1.0))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_gradient_that_is_not_finite_updates_nothing(tmp_path: Path) -> None:
    batch, model = whole_batch(tmp_path, 4), fresh(tmp_path)
    model.embed.weight.register_hook(lambda grad: grad * float("nan"))  # type: ignore[no-untyped-call]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(NotFiniteError, match="gradient norm: nan"):
        train_step(model, Optimizers(model, OptimConfig()), [batch], CPU, "sequential", 1.0, (1.0, 1.0))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.slow
def test_padding_is_not_counted_as_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where a row is longer than the corpus, a step trains on the corpus and no more; a line says so."""
    config = tiny_config(tmp_path, batch=BatchConfig(seq_len=9000, batch_size=2, accumulation=2))
    n_tokens = tiny_dataset(config).split("train").n_tokens
    assert n_tokens < 9000
    config = dataclasses.replace(config, max_steps=None, max_tokens=8 * n_tokens)
    train(config, None, Console(file=sys.stdout, width=200))
    output = capsys.readouterr().out
    assert f"warning: batch.seq_len 9000 exceeds the {n_tokens} tokens of the training split" in output
    records = [r for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if r["kind"] == "train"]
    assert [r["tokens"] for r in records] == [4 * n_tokens, 8 * n_tokens]
    assert [r["epochs"] for r in records] == [4.0, 8.0]


@pytest.mark.parametrize("seq_len", [7, 24, 50])
def test_an_epoch_counts_every_token_once(tmp_path: Path, seq_len: int) -> None:
    dataset = tiny_dataset(tiny_config(tmp_path))
    stream = TrainingStream(dataset, "train", seq_len, 2, batch_size=1, seed=0)
    counted = sum(next(stream).n_tokens for _ in range(stream.rows_per_epoch))
    assert counted == dataset.split("train").n_tokens
