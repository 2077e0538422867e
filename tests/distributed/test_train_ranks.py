"""``mtp train`` on several processes: the run of one process, to the summation order (gloo, float64)."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rich.console import Console

from mtp_ext.distributed import fully_shard_
from mtp_ext.distributed.ranks import joined_ranks
from mtp_ext.nn import MTPConfig, MTPModel
from mtp_ext.train.checkpoint.directory import list_checkpoints, load_model_state, load_training_state
from mtp_ext.train.config import CheckpointConfig, EvaluationConfig, LossConfig, OptimConfig, TrainConfig
from mtp_ext.train.data import Batch
from mtp_ext.train.optim import Optimizers
from mtp_ext.train.report.record import read_metrics
from mtp_ext.train.run import train
from mtp_ext.train.step import train_step
from tests.support import forked
from tests.train.test_step import CPU
from tests.train.tiny import tiny_config

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available(), reason="torch without distributed"),
]

FROM_THE_CLOCK = ("seconds", "tokens_per_second", "memory_bytes")


def config_of(root: Path, name: str, variant: str, tied: bool) -> TrainConfig:
    """Eight steps of six rows: accumulation, clipping that bites, validations, a head that joins halfway."""
    config = tiny_config(
        root,
        max_steps=8,
        optim=OptimConfig(name=name, clip_norm=0.3),  # type: ignore[arg-type]
        loss=LossConfig(curriculum="forward"),
        evaluation=EvaluationConfig(every_steps=3, batches=2),
        checkpoint=CheckpointConfig(every_seconds=0, every_steps=3, keep_last=10),
    )
    batch = dataclasses.replace(config.batch, batch_size=6)
    model = dataclasses.replace(config.model, variant=variant, tie_embeddings=tied)
    return dataclasses.replace(config, batch=batch, model=model)


def join(rank: int, world: int, port: int) -> None:
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    os.environ.update(address, RANK=str(rank), WORLD_SIZE=str(world))


def train_rank(rank: int, world: int, port: int, config: TrainConfig) -> None:
    """Trains from the last checkpoint of the run, if it has one."""
    join(rank, world, port)
    assert config.out is not None
    found = list_checkpoints(config.out / "checkpoints")
    with joined_ranks() as ranks:
        train(config, found[-1] if found else None, Console(quiet=True), ranks)


def run_ranks(function: Any, world: int, *arguments: Any) -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    forked.call_ranks(function, world, world, store.port, *arguments)


def records(directory: Path) -> list[dict[str, Any]]:
    kept = read_metrics(directory / "metrics.jsonl")
    return [{name: value for name, value in record.items() if name not in FROM_THE_CLOCK} for record in kept]


def numbers(value: Any) -> Iterator[Any]:
    """The values of nested containers, in one order."""
    if isinstance(value, dict):
        for key in sorted(value, key=str):
            yield from numbers(value[key])
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from numbers(item)
    elif isinstance(value, torch.Tensor):
        yield value.double()
    else:
        yield value


def assert_same_run(ours: Path, theirs: Path) -> None:
    mine, other = records(ours), records(theirs)
    assert [(r["kind"], r["step"]) for r in mine] == [(r["kind"], r["step"]) for r in other]
    for a, b in zip(mine, other, strict=True):
        for name in a:
            within = 1e-6 if name in ("top1", "accept_length") else 1e-10  # those are float32
            for x, y in zip(numbers(a[name]), numbers(b[name]), strict=True):
                assert x == (pytest.approx(y, rel=within) if isinstance(y, float) else y), (a["step"], name)
    last, expected = (list_checkpoints(path / "checkpoints")[-1] for path in (ours, theirs))
    assert last.step == expected.step == 8
    tensors = load_model_state(expected)
    for name, value in load_model_state(last).items():
        torch.testing.assert_close(value, tensors[name], rtol=1e-8, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")
    states = [load_training_state(checkpoint)["optimizers"] for checkpoint in (last, expected)]
    for a, b in zip(*(list(numbers(state)) for state in states), strict=True):
        if isinstance(a, torch.Tensor):
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "variant", "tied"),
    [
        ("adamw", "parallel", False),
        ("muon", "sequential_modules", True),
        ("muon", "replicated", True),
        ("adamw", "shared", True),
    ],
)
def test_any_number_of_processes_is_one_run(tmp_path: Path, name: str, variant: str, tied: bool) -> None:
    """Also a run that two processes begin, three continue after step 3, and one after step 6."""
    config = config_of(tmp_path, name, variant, tied)
    alone, parts = (dataclasses.replace(config, out=tmp_path / name) for name in ("alone", "parts"))
    run_ranks(train_rank, 1, alone)
    for world, step in ((2, 3), (3, 6), (1, 8)):
        run_ranks(train_rank, world, parts)
        assert_same_run(tmp_path / "parts", tmp_path / "alone")
        for checkpoint in list_checkpoints(tmp_path / "parts" / "checkpoints"):  # as if killed before them
            if checkpoint.step > step:
                shutil.rmtree(checkpoint.path)


def step_rank(rank: int, world: int, port: int) -> None:
    """Heads without a target in some processes, or in all; unequal numbers of targets; accumulation."""
    join(rank, world, port)
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(3)
    rows = []
    for _ in range(2 * world):
        labels = torch.randint(11, (1, 9), generator=generator)
        ids = torch.zeros_like(labels)
        rows.append(Batch(labels[:, :6].clone(), labels, ids))
    rows[0].labels[:] = -100  # rank 0's first micro-batch has no target at all
    rows[1].labels[:, 2:] = -100  # and rank 1's only one, of head 1
    optim = OptimConfig(clip_norm=0.1)
    with joined_ranks() as ranks:
        for variant, weights in (
            ("parallel", (1.0, 0.5, 2.0)),
            ("causal", (1.0, 0.0, 2.0)),
            ("anticausal", (0.0, 1.0, 1.0)),
        ):
            alone, model = (
                MTPModel(MTPConfig(11, d_model=8, n_layers=4, n_attn_heads=2, d_ff=8, n_future=3, variant=variant))
                for _ in range(2)
            )
            model.load_state_dict(alone.state_dict())
            fully_shard_(model)
            expected = train_step(alone, Optimizers(alone, optim), rows, CPU, "sequential", 1.0, weights)
            mine = [rows[rank], rows[world + rank]]
            found = train_step(model, Optimizers(model, optim), mine, CPU, "sequential", 1.0, weights, ranks)
            assert found.grad_norm == pytest.approx(expected.grad_norm, rel=1e-10)
            assert found.heads.n_valid == expected.heads.n_valid
            assert found.heads.loss == pytest.approx(expected.heads.loss, rel=1e-10)
            for ours, theirs in zip(model.parameters(), alone.parameters(), strict=True):
                torch.testing.assert_close(ours.full_tensor(), theirs, rtol=1e-8, atol=1e-10)  # type: ignore[operator]


@pytest.mark.parametrize("world", [2, 3])
def test_a_step_counts_the_targets_of_all_processes(world: int) -> None:
    run_ranks(step_rank, world)
