"""Tensors kept between forward and backward: in-place changes are noticed, saved gradients stay whole."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mtp_ext.nn import MTPConfig, MTPModel
from mtp_ext.ops import linear_cross_entropy, multi_token_cross_entropy
from mtp_ext.ops.common.backend import CpuBackend, use_backend

ROWS, WIDTH, VOCAB = 12, 8, 17


def make(**weights: Tensor) -> dict[str, Any]:
    return {
        "hidden": torch.randn(ROWS, WIDTH, requires_grad=True),
        "weight": torch.randn(VOCAB, WIDTH, requires_grad=True),
        "targets": torch.randint(1, VOCAB, (ROWS,)),
        **weights,
    }


WEIGHTS: dict[str, Callable[[], Tensor]] = {
    "token_weights": lambda: torch.rand(ROWS) + 1,
    "class_weights": lambda: torch.rand(VOCAB) + 1,
}


@pytest.mark.parametrize("options", [{"reduction": "none"}, {"return_lse": True}], ids=str)
@pytest.mark.parametrize("changed", ["targets", "hidden", "weight", "bias", *WEIGHTS])
def test_a_change_before_backward_is_an_error(changed: str, options: dict[str, Any]) -> None:
    arguments = make(bias=torch.zeros(VOCAB), **{name: value() for name, value in WEIGHTS.items()})
    out = linear_cross_entropy(**arguments, **options)
    loss = out.sum() if isinstance(out, Tensor) else out[0]
    with torch.no_grad():
        arguments[changed].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("changed", ["labels", "document_ids", "token_weights"])
def test_a_change_before_the_backward_of_heads_is_an_error(changed: str) -> None:
    hidden, weight = torch.randn(2, 1, 6, WIDTH, requires_grad=True), torch.randn(VOCAB, WIDTH, requires_grad=True)
    labels = torch.randint(1, VOCAB, (1, 8))
    arguments = {"labels": labels, "document_ids": torch.ones_like(labels), "token_weights": torch.rand(1, 8)}
    loss = multi_token_cross_entropy(hidden, weight, **arguments, reduction="none").loss
    arguments[changed].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.sum().backward()


def test_a_reduced_loss_has_its_gradients_already() -> None:
    """As in torch, changes after the forward are no business of the backward: it reads none of the arguments."""
    arguments = make()
    loss = linear_cross_entropy(**arguments)
    expected = torch.autograd.grad(loss, arguments["weight"], retain_graph=True)
    arguments["targets"].zero_()
    assert torch.equal(torch.autograd.grad(loss, arguments["weight"])[0], expected[0])


LOSSES: dict[str, Callable[[dict[str, Any]], Tensor]] = {
    "mean": lambda x: linear_cross_entropy(**x),  # type: ignore[dict-item,return-value]
    "options": lambda x: linear_cross_entropy(**x, label_smoothing=0.1),  # type: ignore[dict-item,return-value]
    "sum": lambda x: linear_cross_entropy(**x, reduction="sum"),  # type: ignore[dict-item,return-value]
    "rows": lambda x: linear_cross_entropy(**x, reduction="none").sum(),  # type: ignore[union-attr]
}


@pytest.mark.parametrize("loss_of", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("change", [lambda g: g.zero_(), lambda g: g.mul_(0.5), lambda g: g.data.zero_()])
def test_gradients_may_be_changed_between_backwards(
    loss_of: Callable[[dict[str, Any]], Tensor], change: Callable[[Tensor], Tensor]
) -> None:
    arguments = make()
    loss, leaves = loss_of(arguments), (arguments["hidden"], arguments["weight"])
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    expected = [g.clone() for g in first]
    for grad in first:
        change(grad)
    for _ in range(2):  # into .grad, which an optimiser or clipping changes
        for leaf in leaves:
            leaf.grad = None
        loss.backward(retain_graph=True)  # type: ignore[no-untyped-call]
        for leaf, grad in zip(leaves, expected, strict=True):
            assert torch.equal(leaf.grad, grad)
            change(leaf.grad)
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(loss, leaves), expected, strict=True))


@pytest.mark.parametrize("schedule", ["sequential", "joint"])
def test_gradients_of_models_may_be_changed_between_backwards(schedule: str) -> None:
    model = MTPModel(MTPConfig(VOCAB, WIDTH, 4, 2, n_future=2))
    labels = torch.randint(VOCAB, (2, 8))
    loss = model(labels[:, :6], labels, schedule=schedule).loss
    found = []
    for _ in range(3):
        model.zero_grad()
        loss.backward(retain_graph=True)
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        for p in model.parameters():
            assert p.grad is not None
            p.grad.data.fill_(7.0)
    assert all(torch.equal(a, b) for again in found[1:] for a, b in zip(found[0], again, strict=True))


def test_the_last_backward_copies_nothing() -> None:
    arguments = make()
    linear_cross_entropy(**arguments).backward()  # type: ignore[union-attr,no-untyped-call]
    seen: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: seen.append(x.data_ptr()) or x, lambda x: x):  # type: ignore[func-returns-value]
        loss = linear_cross_entropy(**arguments)
    assert isinstance(loss, Tensor)
    grads = torch.autograd.grad(loss, (arguments["weight"], arguments["hidden"]))
    assert [g.data_ptr() for g in grads] == seen[:2]


@pytest.mark.parametrize("name", WEIGHTS)
def test_what_gets_no_gradient_may_not_require_one(name: str) -> None:
    arguments = make(**{name: WEIGHTS[name]().requires_grad_()})
    with pytest.raises(ValueError, match=f"{name} must not require grad"):
        linear_cross_entropy(**arguments)
    with torch.no_grad():
        linear_cross_entropy(**arguments)


@pytest.mark.parametrize("schedule", ["sequential", "joint", "autograd", None])
@pytest.mark.parametrize("name", ["token_weights", "normalizer"])
def test_what_gets_no_gradient_may_not_require_one_in_heads(name: str, schedule: str | None) -> None:
    labels = torch.randint(VOCAB, (2, 8))
    value = (torch.rand(2, 8) if name == "token_weights" else torch.tensor(5.0)).requires_grad_()
    model = MTPModel(MTPConfig(VOCAB, WIDTH, 4, 2, n_future=2))
    with pytest.raises(ValueError, match=f"{name} must not require grad"):
        if schedule is None:
            multi_token_cross_entropy(torch.randn(2, 2, 6, WIDTH), torch.randn(VOCAB, WIDTH), labels, **{name: value})
        else:
            model(labels[:, :6], labels, schedule=schedule, **{name: value})


@pytest.mark.parametrize("options", [{}, {"z_loss": 0.1}, {"reduction": "none"}, {"return_lse": True}], ids=str)
def test_backward_of_fake_tensors(options: dict[str, Any]) -> None:
    """Memory planners run forward and backward without values."""
    with FakeTensorMode():
        arguments = make()
        out = linear_cross_entropy(**arguments, **options)
        (out.sum() if isinstance(out, Tensor) else out[0]).backward()
        assert arguments["hidden"].grad.shape == (ROWS, WIDTH) and arguments["weight"].grad.shape == (VOCAB, WIDTH)


def test_batched_incoming_gradients() -> None:
    arguments = make()
    loss, incoming = linear_cross_entropy(**arguments), torch.tensor([0.0, 1.0, -2.5])
    (found,) = torch.autograd.grad(loss, arguments["weight"], incoming, is_grads_batched=True, retain_graph=True)  # type: ignore[arg-type]
    (one,) = torch.autograd.grad(loss, arguments["weight"])  # type: ignore[arg-type]
    torch.testing.assert_close(found, incoming[:, None, None] * one)


@pytest.mark.parametrize("native", [True, False], ids=["native", "row loop"])
@pytest.mark.parametrize("options", [{}, {"z_loss": 0.1}, {"reduction": "none"}, {"return_lse": True}], ids=str)
def test_mutation_that_torch_is_told_to_allow(options: dict[str, Any], native: bool) -> None:
    """The context looks at the written arguments of every operator, and clones what is saved."""
    arguments = make(bias=torch.randn(VOCAB, requires_grad=True), token_weights=torch.rand(ROWS))
    leaves = [arguments[name] for name in ("hidden", "weight", "bias")]

    def loss_of(made: dict[str, Any]) -> Tensor:
        out = linear_cross_entropy(**made, **options)
        return out.sum() if isinstance(out, Tensor) else out[0] + out[1].sum()

    expected = torch.autograd.grad(loss_of(arguments), leaves)
    with use_backend(CpuBackend(native_loss=native)), torch.autograd.graph.allow_mutation_on_saved_tensors():
        made = arguments | {name: arguments[name].clone() for name in ("hidden", "weight", "targets", "token_weights")}
        loss = loss_of(made)
        for name in ("hidden", "weight", "targets", "token_weights"):
            made[name].zero_()
        found = torch.autograd.grad(loss, leaves)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


HOOKS: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "mutation": torch.autograd.graph.allow_mutation_on_saved_tensors,
    "on the CPU": torch.autograd.graph.save_on_cpu,
    "packed": lambda: torch.autograd.graph.saved_tensors_hooks(lambda x: x.numpy().copy(), torch.from_numpy),
    "disabled": lambda: torch.autograd.graph.disable_saved_tensors_hooks("no hooks"),
}


@pytest.mark.parametrize("hooks", HOOKS)
@pytest.mark.parametrize("loss_of", LOSSES.values(), ids=LOSSES)
def test_hooks_on_saved_tensors(loss_of: Callable[[dict[str, Any]], Tensor], hooks: str) -> None:
    arguments = make()
    leaves = (arguments["hidden"], arguments["weight"])
    expected = torch.autograd.grad(loss_of(arguments), leaves)
    with HOOKS[hooks]():
        loss = loss_of(arguments)
        found = torch.autograd.grad(loss, leaves)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("hooks", ["mutation", "on the CPU"])
@pytest.mark.parametrize("schedule", ["sequential", "joint", "autograd"])
def test_hooks_on_saved_tensors_of_models(schedule: str, hooks: str) -> None:
    model, labels, found = MTPModel(MTPConfig(VOCAB, WIDTH, 4, 2, n_future=2)), torch.randint(VOCAB, (2, 8)), []
    for context in (nullcontext, HOOKS[hooks]):
        model.zero_grad()
        with context():
            model(labels[:, :6], labels, schedule=schedule).loss.backward()
        found.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
