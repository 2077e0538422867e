"""Second derivatives: an error from every loss and schedule, the true ones from norms and the autograd schedule."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mtp_ext.nn import MTPConfig, MTPModel
from mtp_ext.ops import linear_cross_entropy, multi_token_cross_entropy
from mtp_ext.ops.common.backend import CpuBackend, use_backend
from mtp_ext.ops.rms_norm import rms_norm, rms_norm_heads

ROWS, WIDTH, VOCAB = 12, 8, 17
MESSAGE = "have no second derivative"
OPTIONS: list[dict[str, Any]] = [
    {},
    {"label_smoothing": 0.1},
    {"reduction": "sum"},
    {"reduction": "none"},
    {"return_lse": True},
    {"bias": torch.zeros(VOCAB)},
]


def summed(out: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    return out.sum() if isinstance(out, Tensor) else out[0] + out[1].sum()


@pytest.fixture
def leaves() -> list[Tensor]:
    return [torch.randn(ROWS, WIDTH, requires_grad=True), torch.randn(VOCAB, WIDTH, requires_grad=True)]


@pytest.mark.parametrize("native", [True, False], ids=["native", "row loop"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_penalty_on_a_gradient_raises(leaves: list[Tensor], options: dict[str, Any], native: bool) -> None:
    with use_backend(CpuBackend(native_loss=native)):
        loss = summed(linear_cross_entropy(*leaves, torch.randint(VOCAB, (ROWS,)), **options))
    for grad in torch.autograd.grad(loss, leaves, create_graph=True):
        with pytest.raises(RuntimeError, match=MESSAGE):
            (loss + grad.square().sum()).backward()
        for leaf in leaves:  # also asked for one leaf alone, which autograd reaches by pruning the graph
            with pytest.raises(RuntimeError, match=MESSAGE):
                torch.autograd.grad(grad.sum(), leaf, retain_graph=True, allow_unused=True)


@pytest.mark.parametrize("transform", ["hessian", "hvp", "vhp"])
def test_functional_transforms_raise(leaves: list[Tensor], transform: str) -> None:
    hidden, weight = leaves
    targets = torch.randint(VOCAB, (ROWS,))
    vector = () if transform == "hessian" else (torch.ones(ROWS, WIDTH),)
    with pytest.raises(RuntimeError, match=MESSAGE):
        getattr(torch.autograd.functional, transform)(
            lambda h: linear_cross_entropy(h, weight, targets), hidden.detach(), *vector
        )


def test_a_layer_below_is_reached(leaves: list[Tensor]) -> None:
    """The hidden states are an intermediate result that nobody else holds."""
    layer = torch.nn.Linear(WIDTH, WIDTH)
    loss = summed(linear_cross_entropy(layer(leaves[0]), leaves[1], torch.randint(VOCAB, (ROWS,))))
    (grad,) = torch.autograd.grad(loss, layer.weight, create_graph=True)
    with pytest.raises(RuntimeError, match=MESSAGE):
        torch.autograd.grad(grad.sum(), layer.bias)


def test_hidden_states_are_freed(leaves: list[Tensor]) -> None:
    """What the error needs of the inputs is their graph, not their memory."""
    hidden = leaves[0] * 2
    storage = hidden.untyped_storage()._weak_ref()  # type: ignore[no-untyped-call]
    loss = linear_cross_entropy(hidden, leaves[1], torch.randint(VOCAB, (ROWS,)))
    del hidden
    gc.collect()
    assert torch.UntypedStorage._expired(storage), loss  # type: ignore[no-untyped-call]


def test_create_graph_alone_changes_nothing(leaves: list[Tensor]) -> None:
    hidden, labels = leaves[0].view(1, 1, ROWS, WIDTH), torch.randint(VOCAB, (1, ROWS + 1))
    loss = multi_token_cross_entropy(hidden, leaves[1], labels).loss
    expected = torch.autograd.grad(loss, leaves, retain_graph=True)
    found = torch.autograd.grad(loss, leaves, create_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def penalised(model: MTPModel, tokens: Tensor, labels: Tensor, schedule: str) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):  # the others have no second derivative in torch
        loss = model(tokens, labels, schedule=schedule).loss
        grads = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
    return torch.stack([grad.square().sum() for grad in grads]).sum()


@pytest.mark.parametrize("variant", ["parallel", "causal", "linear", "shared"])
def test_models(variant: str) -> None:
    model = MTPModel(MTPConfig(VOCAB, WIDTH, 4, 2, n_future=2, variant=variant)).double()
    labels = torch.randint(VOCAB, (2, 8))
    for schedule in ("sequential", "joint"):
        penalty = penalised(model, labels[:, :6], labels, schedule)
        with pytest.raises(RuntimeError, match=MESSAGE):
            penalty.backward()
    model.zero_grad()
    weight, step = model.trunk.layers[0].ff.down.weight, 1e-6
    penalised(model, labels[:, :6], labels, "autograd").backward()
    assert weight.grad is not None
    slope, values = float(weight.grad[0, 0]), []
    for sign in (1, -1):
        with torch.no_grad():
            weight[0, 0] += sign * step
        values.append(float(penalised(model, labels[:, :6], labels, "autograd")))
        with torch.no_grad():
            weight[0, 0] -= sign * step
    assert slope == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-4)


@pytest.mark.parametrize("norm", [rms_norm, rms_norm_heads])
def test_norms_have_true_second_derivatives(norm: Callable[[Tensor, Tensor, float], Tensor]) -> None:
    x = torch.randn(3, WIDTH, dtype=torch.float64, requires_grad=True)
    shape = (WIDTH,) if norm is rms_norm else (2, WIDTH)
    weight = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x, w: norm(x, w, 1e-5), (x, weight))  # type: ignore[no-untyped-call]
