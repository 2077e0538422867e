"""Runs of every architecture, from the first step to a loaded model that writes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from mtp_ext.generate import generate
from mtp_ext.nn.variants import VARIANTS
from mtp_ext.train.checkpoint.saved_model import load_saved_model
from mtp_ext.train.config import OptimConfig, ScheduleConfig
from mtp_ext.train.report.record import read_metrics
from tests.train.tiny import run, tiny_config


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["sequential", "joint"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_heads_loss_falls_and_the_model_loads(tmp_path: Path, variant: str, schedule: str) -> None:
    """Loads strictly, in what it was trained as, and continues a text as its own full forward does."""
    config = tiny_config(
        tmp_path,
        max_steps=30,
        optim=OptimConfig(lr=0.01),
        schedule=ScheduleConfig(warmup_steps=3),
    )
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, variant=variant, n_layers=None, n_future=3),
        loss=dataclasses.replace(config.loss, schedule=schedule),
    )
    outcome = run(config)
    records = list(read_metrics(outcome.directory / "metrics.jsonl"))
    first, last = records[0]["head_loss"], records[-1]["head_loss"]
    assert records[-1]["final"] and len(first) == 3
    assert all(after < before - 0.5 for before, after in zip(first, last, strict=True)), (first, last)

    model = load_saved_model(outcome.checkpoint, torch.device("cpu")).model
    assert model.config.variant == variant
    prompts = [torch.randint(256, (5,)), torch.randint(256, (8,))]
    written = generate(model, prompts, 6).tokens
    for prompt, new in zip(prompts, written, strict=True):
        tokens = prompt
        for token in new:
            expected = model(tokens[None])[0, -1].argmax()
            assert token == expected
            tokens = torch.cat([tokens, token[None]])
