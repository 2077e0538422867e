"""FSDP2 trains as one process does, whatever it wraps and in every schedule (gloo, two processes, float64)."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from mtp_ext.nn import ComposedModel, MTPConfig, MTPModel
from mtp_ext.nn.variants import VARIANTS
from tests.support import forked

if dist.is_available():
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
    from torch.distributed.tensor import DTensor

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available(), reason="torch without distributed"),
]

V, S, N = 37, 10, 3
SHAPE = {"vocab_size": V, "d_model": 16, "n_attn_heads": 2, "d_ff": 24, "n_future": N}
SCHEDULES = ("sequential", "joint", "autograd")
Model = Any  # MTPModel or ComposedModel


def make_model(variant: str = "parallel", **fields: Any) -> MTPModel:
    torch.manual_seed(0)
    n_layers = VARIANTS[variant].n_layers(N) + 1
    return MTPModel(MTPConfig(**SHAPE, variant=variant, n_layers=n_layers, **fields)).double()


def make_composed() -> ComposedModel:
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Embedding(V, 16), nn.Linear(16, 16))
    trunk.layers = [trunk[1]]
    unembed = nn.Linear(16, V, bias=False)
    heads = [nn.Sequential(nn.Linear(16, 16), nn.GELU()) for _ in range(N)]
    return ComposedModel(trunk, heads, unembed, variant="causal").double()


def make_recomputing() -> MTPModel:
    model = make_model("causal")
    model.heads.recompute = True
    return model


def make_frozen() -> MTPModel:
    model = make_model("causal")
    for part in (model.heads.head(2), model.trunk.layers[0]):
        part.requires_grad_(False)
    return model


def shard_layers(model: Model, **keywords: Any) -> None:
    """The trunk's layers, each; the rest with the root."""
    for layer in model.trunk.layers:
        fully_shard(layer, **keywords)
    fully_shard(model, **keywords)


def shard_heads(model: Model, **keywords: Any) -> None:
    for k in range(1, N + 1):
        fully_shard(model.heads.head(k), **keywords)
    shard_layers(model, **keywords)


def shard_blocks(model: Model, **keywords: Any) -> None:
    """Modules within the heads."""
    for k in range(1, N + 1):
        if model.heads.head(k).block is not None:
            fully_shard(model.heads.head(k).block, **keywords)
    shard_layers(model, **keywords)


def shard_both(model: Model, **keywords: Any) -> None:
    """Modules within the heads, and the heads."""
    for k in range(1, N + 1):
        fully_shard(model.heads.head(k).block.attention, **keywords)
    shard_heads(model, **keywords)


def shard_what_is_read(model: Model, **keywords: Any) -> None:
    """Also modules whose weights are read and which are not called."""
    for module in (model.unembed, model.embed, model.heads.norm):
        if module is not None:
            fully_shard(module, **keywords)
    shard_heads(model, **keywords)


def shard_all_heads(model: Model, **keywords: Any) -> None:
    """The heads as one."""
    fully_shard(model.heads, **keywords)
    shard_layers(model, **keywords)


def shard_pairs(model: Model, **keywords: Any) -> None:
    """Two heads in one group."""
    fully_shard([model.heads.head(1), model.heads.head(2)], **keywords)
    shard_layers(model, **keywords)


def shard_tied_pair(model: Model, **keywords: Any) -> None:
    """A tied embedding and unembedding in a group of their own."""
    fully_shard([model.embed, model.unembed], **keywords)
    shard_heads(model, **keywords)


def shard_and_prefetch(model: Model, **keywords: Any) -> None:
    """The first head's gather is asked for in the trunk."""
    shard_heads(model, **keywords)
    model.trunk.layers[-1].set_modules_to_forward_prefetch([model.heads.head(1)])


class Case:
    """A model, how it is sharded, how it is called."""

    def __init__(self, make: Callable[[], Model], shard: Callable[..., None], reshard: bool | None = None, **call: Any):
        self.make, self.call = make, call
        self.shard = shard if reshard is None else lambda model: shard(model, reshard_after_forward=reshard)


def cases() -> dict[str, Case]:
    found: dict[str, Case] = {}
    for variant in VARIANTS:
        found[f"heads {variant}"] = Case(lambda variant=variant: make_model(variant), shard_heads)
    for schedule in SCHEDULES:
        for reshard in (True, False):
            found[f"layers, {schedule}, {reshard}"] = Case(make_model, shard_layers, reshard, schedule=schedule)
        chained = Case(lambda: make_model("causal"), shard_all_heads, schedule=schedule)
        found[f"all heads, {schedule}"] = chained
        apart = Case(lambda: make_model(shared_final_norm=True), shard_what_is_read, schedule=schedule)
        found[f"what is read, {schedule}"] = apart
    modules = Case(lambda: make_model("sequential_modules"), shard_what_is_read, True)
    found |= {
        "heads joint": Case(lambda: make_model("anticausal"), shard_heads, schedule="joint"),
        "heads not resharded": Case(lambda: make_model("causal"), shard_heads, False),
        "blocks": Case(make_model, shard_blocks, True),
        "blocks of modules": Case(lambda: make_model("sequential_modules"), shard_blocks, False),
        "blocks and heads": Case(lambda: make_model("anticausal"), shard_both),
        "pairs": Case(make_model, shard_pairs),
        "modules, what is read": modules,
        "replicated, what is read": Case(lambda: make_model("replicated"), shard_what_is_read),
        "tied": Case(lambda: make_model(tie_embeddings=True), shard_heads),
        "tied pair": Case(lambda: make_model(tie_embeddings=True), shard_tied_pair),
        "prefetch": Case(make_model, shard_and_prefetch),
        "tied modules": Case(lambda: make_model("sequential_modules", tie_embeddings=True), shard_blocks),
        "tied replicated": Case(lambda: make_model("replicated", tie_embeddings=True), shard_heads),
        "shared norm": Case(lambda: make_model("anticausal", shared_final_norm=True), shard_heads, True),
        "recompute": Case(make_recomputing, shard_heads),
        "recompute joint": Case(make_recomputing, shard_heads, schedule="joint"),
        "frozen": Case(make_frozen, shard_heads),
        "detached head": Case(lambda: make_model("causal"), shard_heads, detach_heads=(2,)),
        "detached heads": Case(make_model, shard_heads, detach_heads=(1, 2, 3)),
        "weight 0": Case(make_model, shard_heads, head_weights=[0.5, 0.0, 2.0]),
        "weight 0 at the end": Case(lambda: make_model("causal"), shard_blocks, head_weights=[1.0, 0.5, 0.0]),
        "composed": Case(make_composed, shard_heads),
    }
    return found


def make_labels(rows: int) -> Tensor:
    return torch.randint(V, (rows, S + N), generator=torch.Generator().manual_seed(1))


def error(actual: Tensor | None, expected: Tensor | None) -> float:
    """Largest difference over the largest element, of a shard in the shard; infinite for NaN, or where one is None."""
    if actual is None or expected is None:
        return 0.0 if actual is expected else float("inf")
    actual, expected = actual.detach(), expected.detach()
    scale = expected.abs().amax().clamp(min=1e-300)
    if isinstance(actual, DTensor):
        actual = actual.to_local()
        start = dist.get_rank() * -(-len(expected) // dist.get_world_size())
        expected = expected[start : start + len(actual)]
    assert actual.shape == expected.shape
    if actual.numel() == 0:
        return 0.0
    difference = (actual - expected).abs().amax() / scale
    return float(difference.nan_to_num(nan=float("inf")))  # max() would pass over a NaN


def compare(case: Case, rank: int) -> float:
    """Two optimiser steps of two micro-steps each; the first micro-step of a step is not reduced."""
    alone, model = case.make(), case.make()
    case.shard(model)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (alone, model)]
    batches = make_labels(8).chunk(4)
    worst = 0.0
    for first in (0, 2):
        for i in (first, first + 1):
            labels = batches[i]
            ours = labels[rank : rank + 1]
            model.set_requires_gradient_sync(i == first + 1)
            expected = alone(labels[:, :S], labels, **{**case.call, "schedule": "autograd"}).loss
            expected.backward()
            loss = model(ours[:, :S], ours, **case.call).loss
            loss.backward()
            mean = loss.detach().clone()
            dist.all_reduce(mean)
            worst = max(worst, error(mean / 2, expected))
        pairs = list(zip(model.parameters(), alone.parameters(), strict=True))
        worst = max([worst, *(error(ours.grad, theirs.grad) for ours, theirs in pairs)])
        norms = [torch.nn.utils.clip_grad_norm_(m.parameters(), 0.5) for m in (model, alone)]
        worst = max(worst, error(norms[0].full_tensor(), norms[1]))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return max([worst, *(error(ours, theirs) for ours, theirs in pairs)])


def whole_heads(model: Model) -> list[int]:
    """Heads of which no parameter is a shard."""
    heads = ((k, model.heads.head(k)) for k in range(1, N + 1))
    return [k for k, head in heads if not any(isinstance(p, DTensor) for p in head.parameters())]


def check_one_head_is_whole_at_a_time(labels: Tensor) -> None:
    for variant, recompute, expected in (
        ("parallel", False, [[1], [2], [3]]),
        ("causal", False, [[1], [2], [3]]),
        ("anticausal", True, [[3], [2], [1], [2], [3]]),
    ):
        model = make_model(variant)
        shard_heads(model)
        model.heads.recompute = recompute
        seen: list[list[int]] = []
        for k in range(1, N + 1):
            model.heads.head(k).block.register_forward_hook(lambda *_, seen=seen, m=model: seen.append(whole_heads(m)))
        model.trunk.layers[0].register_full_backward_hook(lambda *_, seen=seen, m=model: seen.append(whole_heads(m)))
        loss = model(labels[:, :S], labels).loss
        assert seen == expected, variant
        assert whole_heads(model) == []
        loss.backward()
        assert seen == [*expected, []], variant
        with torch.no_grad():
            model(labels[:, :S], labels)
        assert whole_heads(model) == []
        assert seen == [*expected, [], *(sorted(expected[:N], reverse=variant == "anticausal"))]


def check_a_head_that_is_gathered_stays_so(labels: Tensor) -> None:
    model = make_model()
    shard_heads(model)
    with torch.no_grad():
        model(labels[:, :S], labels)
        model.heads.head(2).unshard()
        model(labels[:, :S], labels)
    assert whole_heads(model) == [2]


def check_evaluation(labels: Tensor) -> None:
    for shard in (shard_heads, shard_what_is_read):
        alone, model = make_model(shared_final_norm=True).eval(), make_model(shared_final_norm=True).eval()
        shard(model)
        register_fsdp_forward_method(model, "all_logits")
        with torch.no_grad():
            for schedule in SCHEDULES:
                expected = alone(labels[:, :S], labels, schedule=schedule)
                for ours, theirs in zip(model(labels[:, :S], labels, schedule=schedule), expected, strict=True):
                    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
            torch.testing.assert_close(model(labels[:, :S]), alone(labels[:, :S]), rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(model.all_logits(labels), alone.all_logits(labels), rtol=1e-12, atol=1e-12)
            assert whole_heads(model) == []


def check_logits_have_gradients(labels: Tensor) -> None:
    alone, model = make_model(shared_final_norm=True), make_model(shared_final_norm=True)
    shard_what_is_read(model)
    for m in (alone, model):
        m(labels[:, :S]).square().mean().backward()
    for ours, theirs in zip(model.parameters(), alone.parameters(), strict=True):
        assert error(ours.grad, theirs.grad) <= 1e-12


def check_only_the_heads_are_sharded(labels: Tensor) -> None:
    """Nothing is called that FSDP2 wraps: the reduction has to be called for. A failed step leaves no trace."""
    alone, model = make_model(), make_model()
    for k in range(1, N + 1):
        fully_shard(model.heads.head(k))
    failing = model.heads.head(2).block.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(labels[:, :S], labels)
    assert whole_heads(model) == []
    failing.remove()
    for m in (alone, model):
        for _ in range(2):
            m(labels[:, :S], labels).loss.backward()
        hidden = m.trunk(labels[:, :S])
        m.heads(hidden.detach(), labels).loss.backward()
    for ours, theirs in zip(model.parameters(), alone.parameters(), strict=True):
        assert error(ours.grad, theirs.grad) <= 1e-12
    assert all(isinstance(p.grad, DTensor) for p in model.heads.parameters())


def check_what_the_root_did_not_gather_is_an_error(labels: Tensor) -> None:
    model = make_model()
    shard_heads(model)
    with pytest.raises(TypeError, match=r"model\(\.\.\.\)"):
        model.heads(torch.zeros(len(labels), S, 16, dtype=torch.float64), labels)


def check_mixed_precision(labels: Tensor) -> None:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for variant, shard in (("parallel", shard_heads), ("causal", shard_blocks), ("sequential_modules", shard_heads)):
        alone = make_model(variant).float()
        expected = alone(labels[:, :S], labels).loss
        expected.backward()
        for schedule in ("sequential", "joint"):
            model = make_model(variant).float()
            shard(model, mp_policy=policy)
            for micro_step in range(2):  # twice the half: what is not reduced is kept in float32
                model.set_requires_gradient_sync(micro_step == 1)
                loss = model(labels[:, :S], labels, schedule=schedule).loss
                torch.testing.assert_close(loss, expected, rtol=5e-3, atol=0)
                (loss / 2).backward()
            for (name, ours), theirs in zip(model.named_parameters(), alone.parameters(), strict=True):
                assert ours.grad.dtype == torch.float32
                assert error(ours.grad, theirs.grad) <= 0.05, (variant, schedule, name)
            assert model(labels[:, :S]).dtype == torch.bfloat16


CHECKS = (
    check_one_head_is_whole_at_a_time,
    check_a_head_that_is_gathered_stays_so,
    check_evaluation,
    check_logits_have_gradients,
    check_only_the_heads_are_sharded,
    check_what_the_root_did_not_gather_is_an_error,
    check_mixed_precision,
)


def worker(rank: int, store: str, out: str) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")  # a head without a layer
    timeout = timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timeout)
    for check in CHECKS:
        check(make_labels(2))  # the same on both ranks, whose mean is then that of one
    torch.save({name: compare(case, rank) for name, case in cases().items()}, f"{out}.{rank}")
    dist.destroy_process_group()


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    """One pair of processes for everything: to start it takes longer than twenty of the cases."""
    forked.call_ranks(worker, 2, str(tmp_path / "store"), str(tmp_path / "out"))
    for rank in (0, 1):
        found = torch.load(tmp_path / f"out.{rank}")
        assert found.keys() == cases().keys()
        assert {name: worst for name, worst in found.items() if not worst <= 1e-12} == {}
