"""The loss over a vocabulary sharded across processes (gloo) equals the loss in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import mtp_ext
from tests.support import forked
from tests.support.pretend_cuda import pretend_cuda

pytestmark = pytest.mark.slow
B, S, D, V, N = 2, 9, 16, 53, 3
TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-2}

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "documents": {"document_ids": torch.arange(S + N).div(4, rounding_mode="floor").expand(B, -1).contiguous()},
    "smoothing": {"label_smoothing": 0.1, "z_loss": 1e-2, "head_weights": [1.0, 0.5, 0.25]},
    "capped": {"softcap": 4.0, "logit_scale": 1.5, "detach_weight": (2,)},
    "weighted": {"token_weights": torch.rand(B, S + N, generator=torch.Generator().manual_seed(3)), "chunk_rows": 7},
    "sum": {"reduction": "sum"},
}


def inputs(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The same on every rank."""
    g = torch.Generator().manual_seed(0)
    made = {
        "hidden": torch.randn(N, B, S, D, generator=g, dtype=torch.float64),
        "weight": torch.randn(V, D, generator=g, dtype=torch.float64),
        "bias": torch.randn(V, generator=g, dtype=torch.float64),
        "class_weights": torch.rand(V, generator=g, dtype=torch.float64) + 0.5,
    }
    return {k: x.to(dtype) for k, x in made.items()}


def labels() -> torch.Tensor:
    y = torch.randint(V, (B, S + N), generator=torch.Generator().manual_seed(1))
    y[0, 4] = -100
    return y


def evaluate(shard: slice, dtype: torch.dtype, with_vectors: bool, keywords: dict[str, Any]) -> dict[str, torch.Tensor]:
    x = inputs(dtype)
    hidden, weight = x["hidden"].requires_grad_(), x["weight"][shard].clone().requires_grad_()
    bias = x["bias"][shard].clone().requires_grad_() if with_vectors else None
    class_weights = x["class_weights"][shard] if with_vectors else None
    out = mtp_ext.multi_token_cross_entropy(
        hidden, weight, labels(), bias=bias, class_weights=class_weights, **keywords
    )
    (2 * out.loss).backward()
    assert hidden.grad is not None and weight.grad is not None
    results = {**out._asdict(), "grad_hidden": hidden.grad, "grad_weight": weight.grad}
    if bias is not None and bias.grad is not None:
        results["grad_bias"] = bias.grad
    return {k: v.detach() for k, v in results.items()}


def evaluate_rows(shard: slice, keywords: dict[str, Any]) -> dict[str, torch.Tensor]:
    """reduction="none" with arbitrary incoming gradients, of the loss and of the log-sum-exp."""
    x = inputs(torch.float64)
    hidden, weight = x["hidden"].requires_grad_(), x["weight"][shard].clone().requires_grad_()
    targets = torch.randint(V, (N, B, S), generator=torch.Generator().manual_seed(2))
    out = mtp_ext.linear_cross_entropy(hidden, weight, targets, reduction="none", return_lse=True, **keywords)
    loss, lse = out
    g = torch.Generator().manual_seed(4)
    (loss * torch.rand(N, B, S, generator=g) + lse * torch.rand(N, B, S, generator=g)).sum().backward()
    assert hidden.grad is not None and weight.grad is not None
    return {"loss": loss.detach(), "lse": lse.detach(), "grad_hidden": hidden.grad, "grad_weight": weight.grad}


def compare(ours: dict[str, torch.Tensor], whole: dict[str, torch.Tensor], shard: slice, tolerance: float) -> None:
    for name, expected in whole.items():
        expected = expected[shard] if name in ("grad_weight", "grad_bias") else expected
        torch.testing.assert_close(
            ours[name], expected, rtol=tolerance, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}"
        )


def check_shards(sizes: list[int], rank: int) -> None:
    group = dist.group.WORLD
    start = sum(sizes[:rank])
    shard = slice(start, start + sizes[rank])
    for name, keywords in CASES.items():
        for dtype, tolerance in TOLERANCES.items() if name == "plain" else [(torch.float64, 1e-12)]:
            for with_vectors in (False, True):
                whole = evaluate(slice(0, V), dtype, with_vectors, keywords)
                ours = evaluate(shard, dtype, with_vectors, {**keywords, "group": group})
                compare(ours, whole, shard, tolerance)
                losses = [torch.empty_like(ours["loss"]) for _ in sizes]
                dist.all_gather(losses, ours["loss"])
                assert all(torch.equal(x, losses[0]) for x in losses), "ranks hold different losses"
    compare(evaluate_rows(shard, {"group": group}), evaluate_rows(slice(0, V), {}), shard, 1e-12)
    check_a_gpus_bfloat16(shard)
    check_sizes_are_asked_for_once(shard)
    check_compiled(shard)
    bad = labels()
    bad[1, 3] = V
    x = inputs(torch.float32)
    with pytest.raises(ValueError, match=rf"\[0, {V}\)"):
        mtp_ext.multi_token_cross_entropy(x["hidden"], x["weight"][shard], bad, group=group)


def check_a_gpus_bfloat16(shard: slice) -> None:
    """Logits of a shard stay in bfloat16, as the tensor cores give them, and the ranks sum float32 products."""
    logits, summed = set(), set()
    mm, all_reduce = torch.mm, dist.all_reduce

    def recorded_mm(a: torch.Tensor, b: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
        logits.add(out.dtype)
        return mm(a, b, out=out)

    def recorded_sum(x: torch.Tensor, **keywords: Any) -> Any:
        summed.add(x.dtype)
        return all_reduce(x, **keywords)

    whole = evaluate(slice(0, V), torch.float64, True, {})
    with pretend_cuda(may_wait=True), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "mm", recorded_mm)
        patch.setattr(dist, "all_reduce", recorded_sum)
        ours = evaluate(shard, torch.bfloat16, True, {"group": dist.group.WORLD})
    compare({k: x.to(whole[k].dtype) for k, x in ours.items()}, whole, shard, 4e-2)
    assert logits == {torch.bfloat16} and torch.float32 in summed and torch.bfloat16 not in summed


def check_sizes_are_asked_for_once(shard: slice) -> None:
    """To read them, a host waits for its GPU."""
    x, asked = inputs(torch.float64), []
    weight = x["weight"][shard].clone().requires_grad_()
    gather = dist.all_gather

    def counting(gathered: list[torch.Tensor], own: torch.Tensor, **keywords: Any) -> None:
        asked.append(own.dtype == torch.int64)
        gather(gathered, own, **keywords)

    def loss(weight: torch.Tensor) -> int:
        """How often sizes were exchanged."""
        asked.clear()
        mtp_ext.linear_cross_entropy(x["hidden"], weight, torch.ones(N, B, S).long(), group=dist.group.WORLD)
        return sum(asked)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_gather", counting)
        assert [loss(weight), loss(weight), loss(weight.detach()), loss(weight)] == [1, 0, 1, 0]
    with torch.no_grad():
        weight.data = torch.cat([weight.data, weight.data[:1] if len(weight) else x["weight"][:1]])
    with pytest.raises(ValueError, match=r"weight must keep the \d+ classes of its first use with this group, got \d+"):
        mtp_ext.linear_cross_entropy(x["hidden"], weight, torch.ones(N, B, S).long(), group=dist.group.WORLD)


def check_compiled(shard: slice) -> None:
    """One graph, and the gradients that eager mode gives."""
    x = inputs(torch.float64)
    hidden, weight = x["hidden"].requires_grad_(), x["weight"][shard].clone().requires_grad_()

    def function(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return mtp_ext.multi_token_cross_entropy(hidden, weight, labels, group=dist.group.WORLD, softcap=4.0).loss

    expected = function(hidden, weight, labels())
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(hidden, weight, labels())
    found = torch.autograd.grad(compiled, (hidden, weight))
    for ours, eager in zip(
        (compiled, *found), (expected, *torch.autograd.grad(expected, (hidden, weight))), strict=True
    ):
        torch.testing.assert_close(ours, eager, rtol=1e-12, atol=1e-12)
    torch.compiler.reset()


def worker(rank: int, layouts: list[list[int]], rendezvous: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=len(layouts[0]))
    try:
        for sizes in layouts:
            check_shards(sizes, rank)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("layouts", [[[27, 26], [V - 1, 1], [V, 0]], [[20, 3, 30]]], ids=["2 ranks", "3 ranks"])
def test_sharded_equals_whole(layouts: list[list[int]], tmp_path: Path) -> None:
    """Equal, unequal and empty shards over 2 and 3 processes: loss, metrics and gradients are those of one process."""
    forked.call_ranks(worker, len(layouts[0]), layouts, str(tmp_path / "rendezvous"))
