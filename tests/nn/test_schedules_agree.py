"""All schedules give one loss, one set of metrics and one set of gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mtp_ext.nn import MTPModel
from mtp_ext.nn.transformer import attention
from tests.nn.conftest import ALL_VARIANTS

Make = Callable[..., Any]
Error = Callable[[Tensor, Tensor], float]

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "packed documents": {"documents": True},
    "ignored labels": {"ignored": True},
    "all labels ignored": {"ignored": "all"},
    "head weights": {"head_weights": True},
    "token count": {"normalizer": 17.0},
    "short labels": {"short": True},
    "tied": {"model": {"tie_embeddings": True}},
    "shared norm": {"model": {"shared_final_norm": True}},
    "no trunk layer": {"model": {"n_layers": None}},
    "everything": {
        "documents": True,
        "ignored": True,
        "head_weights": True,
        "model": {"tie_embeddings": True, "shared_final_norm": True},
    },
}


def gradients(model: MTPModel, tokens: Tensor, labels: Tensor, **keywords: Any) -> tuple[Any, dict[str, Tensor]]:
    """Loss and the gradients of all parameters and of the trunk's output."""
    model.zero_grad()
    kept: list[Tensor] = []
    handle = model.trunk.register_forward_hook(lambda module, args, output: output.retain_grad() or kept.append(output))
    result = model(tokens, labels, **keywords)
    handle.remove()
    result.loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert kept[0].grad is not None
    return result, grads | {"trunk output": kept[0].grad}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("n_future", [1, 2, 3, 4, 8])
def test_losses_metrics_and_gradients(
    n_future: int, case: str, make_model: Make, make_batch: Make, relative_error: Error, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_MIN_MEAN_SEGMENT", 3)  # short documents, yet one call each
    choice = CASES[case]
    fields = dict(choice.get("model", {}))
    if "n_layers" in fields:
        fields["n_layers"] = n_future
    model = make_model(n_future, **fields)
    tokens, labels = make_batch(n_future)
    keywords: dict[str, Any] = {}
    if choice.get("documents"):
        keywords["document_ids"] = torch.arange(labels.shape[1])[None].add(torch.tensor([[0], [2]])).floor_divide(5)
    if choice.get("ignored"):
        labels = labels.clone()
        labels[:, :] = torch.where(torch.rand(labels.shape) < 0.3, -100, labels)
        if choice["ignored"] == "all":
            labels[:, 1:] = -100
    if choice.get("head_weights"):
        keywords["head_weights"] = [0.5 + k for k in range(n_future)]
    if "normalizer" in choice:
        keywords["normalizer"] = choice["normalizer"]
    if choice.get("short"):
        labels = labels[:, : tokens.shape[1]]

    expected, expected_grads = gradients(model, tokens, labels, schedule="autograd", **keywords)
    for schedule in ("sequential", "joint"):
        result, grads = gradients(model, tokens, labels, schedule=schedule, **keywords)
        assert relative_error(result.loss, expected.loss) < 1e-12
        assert relative_error(result.head_loss, expected.head_loss) < 1e-12
        for name in ("n_valid", "top1", "accept_length"):
            assert torch.equal(getattr(result, name), getattr(expected, name)), name
        assert grads.keys() == expected_grads.keys()
        for name in grads:
            assert relative_error(grads[name], expected_grads[name]) < 1e-12, (schedule, name)


@pytest.mark.parametrize("schedule", ["sequential", "joint", "autograd"])
def test_head_weights_may_be_learned(schedule: str, make_model: Make, make_batch: Make, relative_error: Error) -> None:
    model = make_model(2)
    tokens, labels = make_batch(2)
    head_weights = torch.tensor([0.5, 2.0], requires_grad=True)
    result = model(tokens, labels, head_weights=head_weights, schedule=schedule)
    result.loss.backward()
    assert head_weights.grad is not None and head_weights.grad.dtype == torch.float32
    assert relative_error(head_weights.grad.double(), result.head_loss) < 1e-6


@pytest.mark.parametrize(
    "frozen",
    [
        ("embed", "trunk"),
        ("unembed",),
        ("heads.1",),
        ("heads",),
        ("embed", "trunk", "heads"),
        ("embed", "trunk", "unembed"),
        ("trunk", "heads", "unembed"),
        ("heads.0.norm", "heads.2.block.ff"),
    ],
)
def test_frozen_parts_get_no_gradient(
    frozen: tuple[str, ...], make_model: Make, make_batch: Make, relative_error: Error
) -> None:
    model = make_model(3)
    for part in frozen:
        model.get_submodule(part).requires_grad_(False)
    tokens, labels = make_batch(3)
    grads: dict[str, dict[str, Tensor]] = {}
    for schedule in ("autograd", "sequential", "joint"):
        model.zero_grad()
        model(tokens, labels, schedule=schedule).loss.backward()
        grads[schedule] = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    expected = {name for name, p in model.named_parameters() if p.requires_grad}
    for schedule in grads:
        assert grads[schedule].keys() == expected
        for name in expected:
            assert relative_error(grads[schedule][name], grads["autograd"][name]) < 1e-12, (schedule, name)


def test_everything_frozen_has_no_graph(make_model: Make, make_batch: Make) -> None:
    model = make_model(2).requires_grad_(False)
    tokens, labels = make_batch(2)
    assert not model(tokens, labels).loss.requires_grad


@pytest.mark.parametrize("variant", ALL_VARIANTS)
def test_heads_alone_on_a_given_hidden_state(
    variant: str, make_model: Make, make_batch: Make, relative_error: Error
) -> None:
    model = make_model(3, variant=variant)
    tokens, labels = make_batch(3)
    document_ids = (torch.arange(labels.shape[1]) // 4).expand_as(labels)
    hidden = model.trunk(tokens, document_ids).detach().requires_grad_()
    whole = model(tokens, labels, document_ids)
    grads = {}
    for schedule in ("autograd", "sequential", "joint"):
        result = model.heads(hidden, labels, document_ids, schedule=schedule)
        assert relative_error(result.loss, whole.loss) < 1e-12
        (grads[schedule],) = torch.autograd.grad(result.loss, hidden)
        assert relative_error(grads[schedule], grads["autograd"]) < 1e-12


@pytest.mark.parametrize("schedule", ["sequential", "joint"])
def test_autocast_error_is_at_most_twice_that_of_plain_torch(schedule: str, make_model: Make, make_batch: Make) -> None:
    model = make_model(3, dtype=torch.float32)
    tokens, labels = make_batch(3)

    def run(schedule: str) -> dict[str, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            result = model(tokens, labels, schedule=schedule)
        model.zero_grad()
        result.loss.backward()
        return {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}

    eager, ours = run("autograd"), run(schedule)
    model.double()
    model.zero_grad()
    model(tokens, labels, schedule="autograd").loss.backward()
    for name, p in model.named_parameters():
        assert p.grad is not None
        budget = 2 * (eager[name] - p.grad).norm() + 1e-3 * p.grad.norm()
        assert (ours[name] - p.grad).norm() <= budget, name
