"""The bare loss in a user's own model under FSDP2: the two ways that the error for a DTensor recommends are exact."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from mtp_ext.ops import linear_cross_entropy
from tests.support import forked

if dist.is_available():
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, Partial

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")]

VOCAB, WIDTH, RANKS = 19, 8, 2
WAYS = ("unshard", "full_tensor")


class Model(nn.Module):
    """A language model whose forward gives the loss."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.embed, self.layer = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.lm_head, self.way = nn.Linear(WIDTH, VOCAB, bias=False), way

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        hidden, weight = self.layer(self.embed(tokens)), self.lm_head.weight
        if isinstance(weight, DTensor) and self.way == "raw":
            pass
        elif isinstance(weight, DTensor) and self.way == "full_tensor":
            weight = weight.full_tensor(grad_placements=[Partial("avg")])
        elif isinstance(weight, DTensor):
            self.lm_head.unshard()
            weight = self.lm_head.weight
        loss = linear_cross_entropy(hidden, weight, targets)
        assert isinstance(loss, Tensor)
        return loss


def batch() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randint(VOCAB, (2 * RANKS, 5), generator=g), torch.randint(VOCAB, (2 * RANKS, 5), generator=g)


def make(way: str) -> Model:
    torch.manual_seed(0)
    return Model(way).double()


def worker(rank: int, store: str) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS, timeout=timedelta(seconds=60)
    )
    tokens, targets = batch()
    whole = make("full_tensor")
    whole(tokens, targets).backward()
    mine = slice(2 * rank, 2 * rank + 2)
    for way in WAYS:
        model = make(way)
        fully_shard(model.lm_head)
        fully_shard(model)
        for _ in range(2):  # the second step finds the state that the first one left
            model.zero_grad()
            model(tokens[mine], targets[mine]).backward()
            for (name, p), expected in zip(model.named_parameters(), whole.parameters(), strict=True):
                assert isinstance(p.grad, DTensor), (way, name)
                torch.testing.assert_close(p.grad.full_tensor(), expected.grad, rtol=1e-10, atol=1e-12)
    model = make("raw")
    fully_shard(model.lm_head)
    fully_shard(model)
    with pytest.raises(TypeError, match=r"weight must be a local tensor.*unshard\(\).*Partial"):
        model(tokens[mine], targets[mine])
    dist.destroy_process_group()


def test_the_recommended_ways_are_exact(tmp_path: Path) -> None:
    forked.call_ranks(worker, RANKS, str(tmp_path / "store"))
