"""A corpus and a run small enough to train in a test."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from mtp_ext.nn import MTPModel
from mtp_ext.train.checkpoint.directory import Checkpoint
from mtp_ext.train.config import (
    BatchConfig,
    CheckpointConfig,
    EvaluationConfig,
    LoggingConfig,
    ModelConfig,
    TrainConfig,
)
from mtp_ext.train.data import DataConfig, Dataset, prepare_data
from mtp_ext.train.device import Compute
from mtp_ext.train.run import Outcome, train

CPU = Compute(torch.device("cpu"), bfloat16=False)


def write_corpus(directory: Path, *, files: int = 12, seed: int = 0) -> Path:
    """Python files of small documented functions."""
    directory.mkdir(parents=True, exist_ok=True)
    source = random.Random(seed)
    for number in range(files):
        lines = []
        for name in range(source.randint(2, 4)):
            body = [f"    total = total + values[{source.randint(0, 9)}]" for _ in range(source.randint(4, 8))]
            head = [f"def add_{number}_{name}(values):", '    """Adds some of the values."""', "    total = 0"]
            lines += [*head, *body, "    return total", ""]
        (directory / f"module_{number}.py").write_text("\n".join(lines), encoding="utf-8")
    return directory


def tiny_config(root: Path, **changes: Any) -> TrainConfig:
    """Four steps of a two-head model of width 16 on bytes; ``changes`` replace fields of `TrainConfig`."""
    corpus = root / "corpus"
    if not corpus.exists():
        write_corpus(corpus)
    config = TrainConfig(
        out=root / "run",
        cache=root / "cache",
        max_steps=4,
        device="cpu",
        precision="float32",
        model=ModelConfig(n_future=2, d_model=16, n_layers=3, n_attn_heads=2, d_ff=32),
        data=DataConfig(source=(str(corpus),), tokenizer="bytes", validation_fraction=0.25),
        batch=BatchConfig(seq_len=24, batch_size=2, accumulation=2),
        evaluation=EvaluationConfig(every_steps=0, batch_size=4),
        checkpoint=CheckpointConfig(every_seconds=0, keep_last=10),
        logging=LoggingConfig(every_steps=1, tensorboard=False, plots=False, sample_tokens=0),
    )
    return dataclasses.replace(config, **changes)


def tiny_dataset(config: TrainConfig) -> Dataset:
    """The corpus of a tiny run."""
    assert config.cache is not None
    return prepare_data(config.data, config.cache)


def tiny_model(config: TrainConfig, dataset: Dataset) -> MTPModel:
    """The model of a tiny run, as the run would start with."""
    torch.manual_seed(config.seed)
    return MTPModel(config.model.build(dataset.tokenizer.vocab_size, config.batch.seq_len))


def run(config: TrainConfig, checkpoint: Checkpoint | None = None) -> Outcome:
    """Trains without a word."""
    return train(config, checkpoint, Console(quiet=True))
