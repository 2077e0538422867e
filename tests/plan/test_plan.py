"""The planner: its predictions against resident memory, its categories, its errors."""

from __future__ import annotations

import ctypes
import dataclasses
import sys
from typing import Any

import pytest
import torch

from mtp_ext import _C
from mtp_ext.nn import MTPConfig, MTPModel
from mtp_ext.nn.variants import VARIANTS
from mtp_ext.plan import PlanBytes, plan
from mtp_ext.train.config import OptimConfig
from mtp_ext.train.data import Batch
from mtp_ext.train.device import Compute
from mtp_ext.train.optim import Optimizers
from mtp_ext.train.step import train_step
from tests.support import forked

BATCH, SEQ, MIB = 4, 256, 2**20
pytestmark = pytest.mark.slow

SCHEDULES = ("sequential", "joint", "autograd")
M_MMAP_THRESHOLD = -3  # malloc.h


def make_config(variant: str, n_future: int, **changes: Any) -> MTPConfig:
    n_layers = 2 + VARIANTS[variant].n_layers(n_future)
    return MTPConfig(8000, 256, n_layers, 4, n_future=n_future, variant=variant, **changes)


def make_plan(config: MTPConfig, **changes: Any) -> PlanBytes:
    given: dict[str, Any] = {"batch_size": BATCH, "seq_len": SEQ, "dtype": "float32", "device": "cpu"}
    return plan(config, **(given | changes)).bytes


def measure(config: MTPConfig, schedule: str, optimizer: Any = "adamw", dtype: str = "float32") -> int:
    """Bytes of resident memory that model, optimiser and two steps add; for a fresh process."""
    torch.set_num_threads(1)
    # Blocks go back to the system when they are freed: fragmentation is not what is planned.
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 64 << 10)
    compute = Compute(torch.device("cpu"), bfloat16=dtype == "bfloat16")
    warm = MTPConfig(64, 32, 2 + config.n_head_layers, 2, n_future=config.n_future, variant=config.variant)
    before = 0
    for shape, seq_len in ((warm, 8), (config, SEQ)):  # the first loads the libraries
        model = MTPModel(shape)
        optimizers = Optimizers(model, OptimConfig(name=optimizer))
        labels = torch.randint(shape.vocab_size, (BATCH, seq_len + shape.n_future))
        batch = Batch(labels[:, :seq_len], labels, torch.zeros_like(labels))
        for _ in range(2):
            train_step(model, optimizers, [batch], compute, schedule, 1.0, [1.0] * shape.n_future)
        before = before or forked.peak_bytes()
    return forked.peak_bytes() - before


GRID = [
    *((variant, 4, schedule) for variant in ("parallel", "causal", "replicated") for schedule in SCHEDULES),
    *(("parallel", 1, schedule) for schedule in SCHEDULES),
]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the high-water mark from /proc")
@pytest.mark.parametrize(("variant", "n_future", "schedule"), GRID)
def test_the_peak_is_within_a_tenth_of_resident_memory(variant: str, n_future: int, schedule: str) -> None:
    config = make_config(variant, n_future)
    measured = forked.call(measure, config, schedule)
    planned = make_plan(config, schedule=schedule).peak
    assert abs(planned - measured) <= 0.1 * measured, f"{planned / MIB:.1f} planned, {measured / MIB:.1f} measured"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the high-water mark from /proc")
def test_muon_too_is_within_a_tenth() -> None:
    config = make_config("linear", 2, tie_embeddings=True)
    measured = forked.call(measure, config, "sequential", "muon")
    assert abs(make_plan(config, optimizer="muon").peak - measured) <= 0.1 * measured


def test_the_categories_hold_what_they_say() -> None:
    config = MTPConfig(500, 16, 4, 2, n_future=2)
    found = make_plan(config, batch_size=2, seq_len=64)
    parameters = 4 * config.parameter_counts()["total"]
    assert parameters <= found.parameters < 1.1 * parameters  # and buffers
    assert 2 * parameters <= found.optimizer < 2.1 * parameters  # two moments, and a counter for each parameter
    assert found.logits == 128 * 500 * 4, "one head's rows are one chunk"
    parts = dataclasses.asdict(found)
    assert parts.pop("peak") == sum(parts.values())


@pytest.mark.parametrize("schedule", ["sequential", "joint"])
@pytest.mark.parametrize("variant", ["parallel", "replicated"])
def test_the_chunk_of_logits_is_the_one_that_the_loss_allocates(variant: str, schedule: str) -> None:
    config = MTPConfig(3000, 16, 4, 2, n_future=2, variant=variant)  # two chunks, of unequal sizes in the schedules
    model, labels = MTPModel(config), torch.randint(3000, (3, 402))
    _C.release_workspace()
    model(labels[:, :400], labels, schedule=schedule).loss.backward()
    assert make_plan(config, batch_size=3, seq_len=400, schedule=schedule).logits == _C.release_workspace()


def test_plain_torch_keeps_the_logits_of_all_heads() -> None:
    config = MTPConfig(500, 16, 6, 2, n_future=4)
    assert make_plan(config, schedule="autograd").logits >= 4 * BATCH * SEQ * 500 * 4


def test_memory_grows_with_what_makes_it_grow() -> None:
    small = MTPConfig(500, 16, 4, 2, n_future=2)
    peak = make_plan(small).peak
    assert make_plan(small, batch_size=2 * BATCH).peak > 1.5 * peak
    assert make_plan(dataclasses.replace(small, vocab_size=5000)).peak > peak
    assert make_plan(small, schedule="joint").peak > peak


def test_planning_leaves_nothing_behind() -> None:
    assert make_plan(MTPConfig(300, 16, 4, 2, n_future=2)) == make_plan(MTPConfig(300, 16, 4, 2, n_future=2))
    model = MTPModel(MTPConfig(30, 8, 4, 2, n_future=2))
    labels = torch.zeros(1, 6, dtype=torch.int64)
    assert model(labels[:, :4], labels).loss.isfinite()


def test_a_size_that_no_machine_holds_is_planned() -> None:
    planned = plan(MTPConfig.preset("13B", 32_000), batch_size=1, seq_len=512, device="cpu")
    assert planned.bytes.parameters > 4 * 12e9 and not planned.fits(80) and planned.fits(2000)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"seq_len": 4097}, "seq_len must be at most the model's max_seq_len = 4096, got 4097"),
        ({"schedule": "fastest"}, "schedule must be"),
        ({"dtype": "float16"}, "dtype must be one of float32, bfloat16, got 'float16'"),
        ({"optimizer": "sgd"}, "optimizer must be one of adamw, muon, got 'sgd'"),
        ({"world_size": 8}, "world_size must be 1"),
        ({"device": "tpu"}, "device must be"),
    ],
)
def test_a_wrong_argument_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_plan(MTPConfig(30, 8, 4, 2, n_future=2), **changes)


@pytest.mark.parametrize("changes", [{"batch_size": 1.5}, {"seq_len": None}, {"world_size": True}])
def test_a_size_that_is_no_integer_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=next(iter(changes))):
        make_plan(MTPConfig(30, 8, 4, 2, n_future=2), **changes)
