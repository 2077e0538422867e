"""Data parallelism sees the heads' gradients, which are taken inside the forward, once each: with DDP over gloo."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from mtp_ext.nn import MTPConfig, MTPModel
from tests.support import forked

pytestmark = pytest.mark.slow
SHAPE = {"vocab_size": 37, "d_model": 16, "n_attn_heads": 2, "d_ff": 24, "n_future": 3}
VARIANTS = ("parallel", "linear", "replicated", "causal", "anticausal", "sequential_modules", "shared")


def make_model(variant: str) -> MTPModel:
    torch.manual_seed(0)
    return MTPModel(MTPConfig(**SHAPE, n_layers=5, variant=variant)).double()


def make_labels() -> torch.Tensor:
    return torch.randint(37, (4, 15), generator=torch.Generator().manual_seed(1))


def worker(rank: int, store: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    labels = make_labels()[2 * rank : 2 * rank + 2]
    found = {}
    for variant in VARIANTS:
        model = make_model(variant)
        parallel = DistributedDataParallel(model, bucket_cap_mb=0.001)
        for _ in range(2):  # the second step would find a gradient that the first had left unreduced
            model.zero_grad()
            parallel(labels[:, :12], labels).loss.backward()
        found[variant] = {name: p.grad for name, p in model.named_parameters()}
    torch.save(found, f"{out}.{rank}")
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
def test_ddp_gives_the_gradient_of_the_whole_batch(tmp_path: Path) -> None:
    forked.call_ranks(worker, 2, str(tmp_path / "store"), str(tmp_path / "out"))
    ranks = [torch.load(tmp_path / f"out.{rank}") for rank in (0, 1)]
    labels = make_labels()
    for variant in VARIANTS:
        model = make_model(variant)
        model(labels[:, :12], labels, schedule="autograd").loss.backward()
        for name, p in model.named_parameters():
            assert p.grad is not None
            for found in ranks:
                assert torch.equal(found[variant][name], ranks[0][variant][name]), (variant, name)
                error = (found[variant][name] - p.grad).abs().max()
                assert error <= 1e-12 * p.grad.abs().max(), (variant, name)
