"""Data parallelism sees the heads' gradients, which are taken inside the forward, once each: with DDP over gloo."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mtp_ext.nn import ComposedModel, MTPConfig, MTPModel
from tests.support import forked

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available(), reason="torch without distributed"),
]
SHAPE = {"vocab_size": 37, "d_model": 16, "n_attn_heads": 2, "d_ff": 24, "n_future": 3}
VARIANTS = ("parallel", "linear", "replicated", "causal", "anticausal", "sequential_modules", "shared")
SCHEDULES = ("sequential", "joint", "autograd")
Case = tuple[Callable[[], Any], list[dict[str, Any]]]  # a model, and the keywords of each rank's call


def make_model(variant: str, frozen: str = "", **fields: Any) -> MTPModel:
    torch.manual_seed(0)
    model = MTPModel(MTPConfig(**SHAPE, n_layers=5, variant=variant, **fields)).double()
    model.get_submodule(frozen).requires_grad_(not frozen)
    return model


class Shifted(nn.Module):
    """A head with a scalar parameter."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.tensor(float(k)))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.shift


def make_composed() -> ComposedModel:
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Embedding(37, 16), nn.Tanh())
    return ComposedModel(trunk, Shifted, nn.Linear(16, 37), n_future=3).double()


def make_cases() -> Iterator[tuple[str, Case]]:
    """Everything that leaves a parameter without a gradient in one process, and calls that differ between ranks."""
    for variant in VARIANTS:
        yield variant, (lambda v=variant: make_model(v), [{}, {}])
        for weights in ([1.0, 0.0, 0.0], [0.0, 1.0, 0.0]):
            yield f"{variant} {weights}", (lambda v=variant: make_model(v), [{"head_weights": weights}] * 2)
    yield "no loss", (lambda: make_model("causal"), [{"head_weights": [0.0] * 3}] * 2)
    for variant in ("parallel", "causal"):
        every = {"detach_heads": (1, 2, 3)}
        yield f"{variant}, no gradient for the trunk", (lambda v=variant: make_model(v), [every] * 2)
        off = {"detach_heads": (3,), "head_weights": [0.0, 0.0, 1.0]}
        yield f"{variant}, the only head detached", (lambda v=variant: make_model(v), [off] * 2)
        for frozen in ("heads.1", "trunk", "unembed", "embed"):
            case = [{"head_weights": [1.0, 0.0, 0.0]}] * 2
            yield f"{variant}, {frozen} frozen", (lambda v=variant, f=frozen: make_model(v, f), case)
        ranks = [{"head_weights": [1.0, 0.0, 0.0]}, {"head_weights": [0.0, 1.0, 0.5]}]
        yield f"{variant}, other weights on each rank", (lambda v=variant: make_model(v), ranks)
        yield f"{variant}, nothing to learn on one rank", (lambda v=variant: make_model(v), [{"masked": True}, {}])
    detached = [{"detach_weight": (1, 2, 3)}] * 2
    yield "no gradient for the unembedding", (lambda: make_model("parallel"), detached)
    yield "tied", (lambda: make_model("parallel", tie_embeddings=True), detached)
    yield "own unembeddings", (lambda: make_model("linear", replicate_unembedding=True), detached)
    for case in (detached, [{"head_weights": [0.0, 1.0, 0.0]}] * 2):
        yield f"scalar parameters and a bias {case[0]}", (make_composed, case)


CASES = dict(make_cases())


def loss_of(call: Any, rank: int, schedule: str, *, masked: bool = False, **keywords: Any) -> Tensor:
    labels = torch.randint(37, (4, 15), generator=torch.Generator().manual_seed(1))[2 * rank : 2 * rank + 2]
    targets = torch.full_like(labels, -100) if masked else labels
    loss: Tensor = call(labels[:, :12], targets, schedule=schedule, **keywords).loss
    return loss


def worker(rank: int, store: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    found = {}
    for name, (make, keywords) in CASES.items():
        for schedule in SCHEDULES:
            model = make()
            parallel = DistributedDataParallel(model, bucket_cap_mb=0.001)
            for _ in range(2):  # the second step would find a gradient that the first had left unreduced
                model.zero_grad()
                with parallel.no_sync():
                    loss_of(parallel, rank, schedule, **keywords[rank]).backward()
                loss_of(parallel, rank, schedule, **keywords[rank]).backward()
            found[name, schedule] = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    torch.save(found, f"{out}.{rank}")
    dist.destroy_process_group()


def test_ddp_gives_the_gradient_of_the_whole_batch(tmp_path: Path) -> None:
    forked.call_ranks(worker, 2, str(tmp_path / "store"), str(tmp_path / "out"))
    ranks = [torch.load(tmp_path / f"out.{rank}") for rank in (0, 1)]
    for name, (make, keywords) in CASES.items():
        model = make()
        for rank in (0, 1):
            loss = loss_of(model, rank, "autograd", **keywords[rank])
            if loss.requires_grad:
                loss.backward()  # twice, accumulated, and averaged over two ranks: the sum
        for schedule in SCHEDULES:
            for n, p in model.named_parameters():
                if not p.requires_grad:
                    continue
                expected = torch.zeros_like(p) if p.grad is None else p.grad
                for found in ranks:
                    grad = found[name, schedule][n]
                    assert torch.equal(grad, ranks[0][name, schedule][n]), (name, schedule, n)
                    assert (grad - expected).abs().max() <= 1e-12 * expected.abs().max(), (name, schedule, n)


def test_a_parameter_that_is_not_finite_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What gives a head of weight 0 its gradient of zeros does not read its values."""
    model = make_model("parallel")
    monkeypatch.setattr(DistributedDataParallel, "_active_ddp_module", model)
    last = model.heads.head(3)
    with torch.no_grad():
        last.block.ff.down.weight.fill_(float("nan"))
    loss = loss_of(model, 0, "sequential", head_weights=[1.0, 1.0, 0.0])
    assert loss.isfinite()
    loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in last.parameters())
