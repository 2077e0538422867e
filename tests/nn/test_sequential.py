"""What the sequential schedule promises to the rest of a training program."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mtp_ext.nn import MTPModel

Make = Callable[..., Any]


def all_gradients(model: MTPModel) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("n_future", [1, 4])
def test_one_forward_and_one_product_a_head_and_one_trunk_backward(
    n_future: int, make_model: Make, make_batch: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(n_future)
    calls: Counter[str] = Counter()
    products = []
    grad = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *args, **kw: products.append(args) or grad(*args, **kw))

    def count(name: str) -> Callable[..., None]:
        return lambda *args: calls.update([name])

    blocks = {f"trunk {i}": layer for i, layer in enumerate(model.trunk.layers)}
    blocks |= {f"head {k}": model.heads.head(k).block for k in range(1, n_future + 1)}
    for name, block in blocks.items():
        block.register_forward_hook(count(name + " forward"))
        block.register_full_backward_hook(count(name + " backward"))
    tokens, labels = make_batch(n_future)
    result = model(tokens, labels)
    heads = {f"head {k} {way}": 1 for k in range(1, n_future + 1) for way in ("forward", "backward")}
    assert calls == Counter(heads | {"trunk 0 forward": 1, "trunk 1 forward": 1})
    assert len(products) == n_future
    calls.clear()
    result.loss.backward()
    assert calls == Counter({"trunk 0 backward": 1, "trunk 1 backward": 1})
    assert len(products) == n_future


def test_heads_run_one_after_the_other(make_model: Make, make_batch: Make) -> None:
    model = make_model(3)
    order: list[str] = []
    for k in range(1, 4):
        block = model.heads.head(k).block
        block.register_forward_hook(lambda *args, k=k: order.append(f"forward {k}"))
        block.register_full_backward_hook(lambda *args, k=k: order.append(f"backward {k}"))
    model(*make_batch(3))
    assert order == [f"{way} {k}" for k in range(1, 4) for way in ("forward", "backward")]


@pytest.mark.parametrize("fields", [{}, {"tie_embeddings": True, "shared_final_norm": True}])
def test_hooks_see_each_whole_gradient_once(fields: dict[str, Any], make_model: Make, make_batch: Make) -> None:
    model = make_model(4, **fields)
    tokens, labels = make_batch(4)
    model(tokens, labels).loss.backward()
    expected = all_gradients(model)
    model.zero_grad()
    before: dict[str, list[Tensor]] = {name: [] for name in expected}
    after: Counter[str] = Counter()
    for name, p in model.named_parameters():
        p.register_hook(lambda grad, name=name: before[name].append(grad.clone()))
        p.register_post_accumulate_grad_hook(lambda p, name=name: after.update([name]))
    result = model(tokens, labels)
    assert not any(before.values()), "a hook saw the gradient of one head alone"
    result.loss.backward()
    assert after == Counter(expected.keys())
    for name, seen in before.items():
        assert len(seen) == 1, name
        assert torch.equal(seen[0], expected[name]), name


def test_a_hook_that_changes_the_gradient_acts_once(make_model: Make, make_batch: Make) -> None:
    model = make_model(2)
    batch = make_batch(2)
    model(*batch).loss.backward()
    weight = model.heads.head(2).block.ff.down.weight
    expected = 2 * weight.grad
    model.zero_grad()
    weight.register_hook(lambda grad: 2 * grad)
    model(*batch).loss.backward()
    assert torch.equal(weight.grad, expected)


@pytest.mark.parametrize("fields", [{}, {"tie_embeddings": True}])
@pytest.mark.parametrize("factor", [1.0, 4.0])
def test_backward_twice(factor: float, fields: dict[str, Any], make_model: Make, make_batch: Make) -> None:
    """Gradients that backward hands out are not those that it keeps, whatever is done to them in between."""
    model = make_model(3, **fields)
    loss = factor * model(*make_batch(3)).loss
    loss.backward(retain_graph=True)
    first = all_gradients(model)
    loss.backward(retain_graph=True)
    for name, grad in all_gradients(model).items():
        assert torch.equal(grad, 2 * first[name]), name
    for p in model.parameters():
        p.grad.fill_(float("nan"))
    model.zero_grad()
    loss.backward()
    for name, grad in all_gradients(model).items():
        assert torch.equal(grad, first[name]), name


def test_a_scaled_loss_scales_every_gradient(make_model: Make, make_batch: Make) -> None:
    model = make_model(3)
    batch = make_batch(3)
    model(*batch).loss.backward()
    plain = all_gradients(model)
    model.zero_grad()
    (model(*batch).loss * 1024.0).backward()  # a power of two: exact
    for name, grad in all_gradients(model).items():
        assert torch.equal(grad, 1024.0 * plain[name]), name


def test_gradients_accumulate_over_batches(make_model: Make, make_batch: Make) -> None:
    model = make_model(3)
    batches = [make_batch(3) for _ in range(3)]
    parts = []
    for batch in batches:
        model.zero_grad()
        model(*batch).loss.backward()
        parts.append(all_gradients(model))
    model.zero_grad()
    for batch in batches:
        model(*batch).loss.backward()
    for name, grad in all_gradients(model).items():
        assert torch.equal(grad, parts[0][name] + parts[1][name] + parts[2][name]), name


def test_two_losses_in_one_backward(make_model: Make, make_batch: Make, relative_error: Make) -> None:
    model = make_model(2)
    batches = [make_batch(2), make_batch(2)]
    for batch in batches:
        model(*batch).loss.backward()
    expected = all_gradients(model)
    model.zero_grad()
    (model(*batches[0]).loss + model(*batches[1]).loss).backward()
    for name, grad in all_gradients(model).items():
        assert relative_error(grad, expected[name]) < 1e-12, name


def test_two_runs_are_bitwise_equal(make_model: Make, make_batch: Make) -> None:
    model = make_model(3, dtype=torch.float32)
    batch = make_batch(3)
    runs = []
    for _ in range(2):
        model.zero_grad()
        result = model(*batch)
        result.loss.backward()
        runs.append([result.loss, *all_gradients(model).values()])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_no_gradient_is_taken_without_grad_mode(
    make_model: Make, make_batch: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(3)
    batch = make_batch(3)
    expected = model(*batch)

    def fail(*args: Any, **keywords: Any) -> None:
        raise AssertionError("a product was taken")

    monkeypatch.setattr(torch.autograd, "grad", fail)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            result = model(*batch)
        assert not result.loss.requires_grad
        assert torch.equal(result.loss, expected.loss) and torch.equal(result.top1, expected.top1)


def test_inference_first_does_not_break_training_later(make_model: Make, make_batch: Make) -> None:
    model = make_model(2)
    batch = make_batch(2)
    with torch.inference_mode():
        model(*batch)
    model(*batch).loss.backward()
    assert len(all_gradients(model)) == len(list(model.parameters()))


def test_only_the_loss_is_differentiable(make_model: Make, make_batch: Make) -> None:
    result = make_model(2)(*make_batch(2))
    assert [x.requires_grad for x in result] == [True, False, False, False, False]


def test_autocast_reaches_the_heads(make_model: Make, make_batch: Make) -> None:
    model = make_model(2, dtype=torch.float32)
    dtypes: list[torch.dtype] = []
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not model.unembed:
            module.register_forward_hook(lambda module, args, output: dtypes.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        result = model(*make_batch(2))
    assert len(dtypes) == 16 and set(dtypes) == {torch.bfloat16}
    result.loss.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


def test_training_lowers_the_loss_like_plain_autograd(make_model: Make, make_batch: Make) -> None:
    """The same optimiser steps from the same start end at the same parameters."""
    model = make_model(3)
    models = {schedule: copy.deepcopy(model) for schedule in ("sequential", "joint", "autograd")}
    batch = make_batch(3)
    losses: dict[str, list[float]] = {}
    for schedule, m in models.items():
        optimizer = torch.optim.SGD(m.parameters(), lr=0.05)
        losses[schedule] = []
        for _ in range(5):
            optimizer.zero_grad()
            loss = m(*batch, schedule=schedule).loss
            loss.backward()
            nn.utils.clip_grad_norm_(m.parameters(), 1.0)
            optimizer.step()
            losses[schedule].append(loss.item())
    assert losses["autograd"][-1] < losses["autograd"][0]
    for schedule in ("sequential", "joint"):
        assert losses[schedule] == pytest.approx(losses["autograd"], rel=1e-11)


@pytest.mark.parametrize("schedule", ["sequential", "joint"])
def test_a_loss_scale_beyond_float16_reaches_float16_gradients(
    schedule: str, make_model: Make, make_batch: Make
) -> None:
    """65536, where GradScaler starts, is infinite in float16; the gradients that it scales need not be."""
    model = make_model(2, dtype=torch.float16)
    tokens, labels = make_batch(2)
    (65536.0 * model(tokens, labels, head_weights=[1e-3, 1e-3], schedule=schedule).loss).backward()
    grads = [p.grad for p in model.parameters()]
    assert all(g is not None and torch.isfinite(g).all() for g in grads)
    assert any(g is not None and g.any() for g in grads)
