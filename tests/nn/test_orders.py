"""The order in which every variant's heads run, and how often: one forward and one product a head layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mtp_ext.nn import MTPModel
from tests.nn.conftest import ALL_VARIANTS

Make = Callable[..., Any]
Error = Callable[[Tensor, Tensor], float]


def watched(model: MTPModel) -> list[str]:
    """A list that grows by "forward k", "loss k" and "backward k" as the heads do these."""
    events: list[str] = []
    for k in range(1, model.heads.n_heads + 1):
        head = model.heads.head(k)
        head.register_forward_hook(lambda *args, k=k: events.append(f"forward {k}"))
        if head.block is not None:
            head.block.register_full_backward_hook(lambda *args, k=k: events.append(f"backward {k}"))
    return events


def watch_losses(events: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from mtp_ext.ops.loss.accumulator import HeadLossAccumulator

    add = HeadLossAccumulator.add

    def watched_add(self: Any, hidden: dict[int, Tensor]) -> dict[int, Tensor | None]:
        events.extend(f"loss {k}" for k in hidden)
        return add(self, hidden)

    monkeypatch.setattr(HeadLossAccumulator, "add", watched_add)


@pytest.mark.parametrize("n_future", [2, 3, 8])
@pytest.mark.parametrize("variant", ["parallel", "linear", "causal", "anticausal"])
def test_the_papers_order(
    variant: str, n_future: int, make_model: Make, make_batch: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Figure S11: chained heads go back from the one that is furthest from the trunk; the others one after another."""
    model = make_model(n_future, variant=variant)
    events = watched(model)
    watch_losses(events, monkeypatch)
    result = model(*make_batch(n_future))
    outward = list(range(1, n_future + 1))
    if variant in ("parallel", "linear"):
        expected = [f"{what} {k}" for k in outward for what in ("forward", "loss", "backward")]
    else:
        away = outward if variant == "causal" else outward[::-1]
        expected = [f"forward {k}" for k in away]
        expected += [f"{what} {k}" for k in reversed(away) for what in ("loss", "backward")]
    assert events == expected
    events.clear()
    result.loss.backward()
    assert events == [], "the backward ran a head again"


@pytest.mark.parametrize("n_future", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("variant", ALL_VARIANTS)
def test_one_forward_and_one_product_a_layer_and_one_trunk_backward(
    variant: str, n_future: int, make_model: Make, make_batch: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A backward per loss with the graph retained would take n (n + 1) / 2 products of a chain."""
    model = make_model(n_future, variant=variant)
    calls: Counter[str] = Counter()
    products = []
    grad = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *args, **kw: products.append(args) or grad(*args, **kw))
    blocks = {f"trunk {i}": layer for i, layer in enumerate(model.trunk.layers)}
    blocks |= {f"head {k}": model.heads.head(k).block for k in range(1, n_future + 1)}
    blocks = {name: block for name, block in blocks.items() if block is not None}
    for name, block in blocks.items():
        block.register_forward_hook(lambda *args, name=name: calls.update([f"{name} forward"]))
        block.register_full_backward_hook(lambda *args, name=name: calls.update([f"{name} backward"]))
    result = model(*make_batch(n_future))
    expected = Counter({f"{name} forward": 1 for name in blocks})
    expected.update({f"{name} backward": 1 for name in blocks if name.startswith("head")})
    assert calls == expected
    assert len(products) == (1 if variant == "shared" else n_future)
    calls.clear()
    result.loss.backward()
    assert calls == Counter({f"{name} backward": 1 for name in blocks if name.startswith("trunk")})


@pytest.mark.parametrize("schedule", ["joint", "autograd"])
@pytest.mark.parametrize("variant", ["parallel", "causal", "anticausal"])
def test_the_other_schedules_run_the_heads_in_the_same_order(
    variant: str, schedule: str, make_model: Make, make_batch: Make
) -> None:
    """So that dropout draws the same numbers in each."""
    model = make_model(3, variant=variant)
    events = watched(model)
    model(*make_batch(3), schedule=schedule)
    away = (3, 2, 1) if variant == "anticausal" else (1, 2, 3)
    assert events == [f"forward {k}" for k in away]


@pytest.mark.parametrize("variant", ["causal", "anticausal", "sequential_modules"])
def test_recomputing_runs_all_but_the_last_head_twice(variant: str, make_model: Make, make_batch: Make) -> None:
    model = make_model(4, variant=variant)
    model.heads.recompute = True
    events = watched(model)
    model(*make_batch(4))
    away = (4, 3, 2, 1) if variant == "anticausal" else (1, 2, 3, 4)
    forwards = [e for e in events if e.startswith("forward")]
    assert forwards == [f"forward {k}" for k in (*away, *away[-2::-1])]
    assert Counter(e for e in events if e.startswith("backward")) == Counter(
        f"backward {k}" for k in away if model.heads.head(k).block is not None
    )


@pytest.mark.parametrize("frozen", [False, True], ids=["no_grad", "only the unembedding learns"])
@pytest.mark.parametrize("variant", ["causal", "anticausal", "sequential_modules"])
def test_without_a_gradient_in_the_heads_each_runs_once(
    variant: str, frozen: bool, make_model: Make, make_batch: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if it would run again in training; and no output waits for another head's."""
    model = make_model(3, variant=variant)
    model.heads.recompute = True
    batch = make_batch(3)
    expected = model(*batch)
    events = watched(model)
    watch_losses(events, monkeypatch)
    if frozen:
        model.requires_grad_(False)
        model.unembed.requires_grad_(True)
    with torch.set_grad_enabled(frozen):
        result = model(*batch)
    away = (3, 2, 1) if variant == "anticausal" else (1, 2, 3)
    assert events == [f"{what} {k}" for k in away for what in ("forward", "loss")]
    for name in ("loss", "head_loss", "top1", "accept_length"):
        assert torch.equal(getattr(result, name), getattr(expected, name)), name


@pytest.mark.parametrize("variant", ["parallel", "causal", "anticausal"])
@pytest.mark.parametrize("schedule", ["sequential", "joint", "autograd"])
def test_a_head_of_weight_zero_does_not_run(
    schedule: str, variant: str, make_model: Make, make_batch: Make, relative_error: Error
) -> None:
    """Unless a later head of its chain reads it; the loss and all gradients are those of the weight 0."""
    tokens, labels = make_batch(4)
    for weights in ([1.0, 0.5, 0.0, 0.0], [0.0, 1.0, 0.0, 2.0], [0.0, 0.0, 0.0, 1.0], [0.0] * 4):
        model = make_model(4, variant=variant)
        learned = torch.tensor(weights, dtype=torch.float64, requires_grad=True)  # never skipped: it has a gradient
        expected = model(tokens, labels, head_weights=learned, schedule="autograd")
        expected.loss.backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        events = watched(model)
        result = model(tokens, labels, head_weights=weights, schedule=schedule)
        result.loss.backward()
        active = [k for k in range(1, 5) if weights[k - 1]]
        ran = {int(e.split()[1]) for e in events if e.startswith("forward")}
        needed = {
            "parallel": set(active),
            "causal": set(range(1, max(active, default=0) + 1)),
            "anticausal": set(range(min(active, default=5), 5)),
        }
        assert ran == needed[variant]
        assert relative_error(result.loss, expected.loss) < 1e-12
        mask = torch.tensor([w != 0 for w in weights])
        assert relative_error(result.head_loss, expected.head_loss * mask) < 1e-12
        assert torch.equal(result.top1, expected.top1 * mask) and torch.equal(result.n_valid, expected.n_valid)
        for name, p in model.named_parameters():
            if p.grad is None:
                assert not grads[name].any(), name
            else:
                assert relative_error(p.grad, grads[name]) < 1e-12, name
        for k in set(range(1, 5)) - needed[variant]:
            assert all(p.grad is None for p in model.heads.head(k).parameters())


@pytest.mark.parametrize("variant", ["parallel", "causal", "shared", "replicated"])
def test_the_accept_length_is_that_of_the_leading_heads(variant: str, make_model: Make, make_batch: Make) -> None:
    """A head that did not run would leave no position to measure at."""
    model = make_model(4, variant=variant, n_layers=6)
    batch = make_batch(4)
    lengths = [
        model(*batch, head_weights=[1.0, 1.0, 0.0, 0.0], schedule=schedule).accept_length
        for schedule in ("sequential", "joint", "autograd")
    ]
    assert lengths[0] == lengths[1] == lengths[2]
    assert lengths[0] >= 1.0
    if variant == "shared":
        assert lengths[0] > 1.0  # its heads agree wherever a token is repeated
