"""Modules as unembeddings: their bias counts, and what is more than weight and bias is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from mtp_ext.nn import ComposedModel, MTPModel
from mtp_ext.ops.loss.options import RowOptions

VOCAB, WIDTH, N = 30, 8, 2


def model_with(unembed: nn.Module, **keywords: Any) -> ComposedModel:
    trunk = nn.Sequential(nn.Embedding(VOCAB, WIDTH), nn.Tanh())
    return ComposedModel(trunk, [nn.Linear(WIDTH, WIDTH) for _ in range(N)], unembed, **keywords).double()


def step(model: ComposedModel, schedule: str, **keywords: Any) -> tuple[Tensor, list[Tensor]]:
    labels = torch.randint(VOCAB, (2, 5 + N), generator=torch.Generator().manual_seed(0))
    loss = model(labels[:, :5], labels, schedule=schedule, **keywords).loss
    return loss.detach(), list(torch.autograd.grad(loss, list(model.parameters())))


@pytest.mark.parametrize(
    "options", [{}, {"options": RowOptions(label_smoothing=0.1)}, {"token_weights": True}], ids=str
)
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_a_bias_counts_in_every_schedule(softcap: float | None, options: dict[str, Any]) -> None:
    model = model_with(nn.Linear(WIDTH, VOCAB), softcap=softcap)
    if "token_weights" in options:
        options = {"token_weights": torch.rand(2, 5 + N).double()}
    expected, grads = step(model, "autograd", **options)
    for schedule in ("sequential", "joint"):
        found, ours = step(model, schedule, **options)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
        for a, b in zip(ours, grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def test_logits_have_the_bias() -> None:
    unembed = nn.Linear(WIDTH, VOCAB)
    model = model_with(unembed)
    normed = torch.randn(4, WIDTH, dtype=torch.float64)
    expected = unembed(normed)
    torch.testing.assert_close(model.heads.logits(1, normed), expected)
    logits, ids = model.heads.best_classes(1, normed, 3)
    best = expected.topk(3)
    torch.testing.assert_close(logits, best.values)
    assert torch.equal(ids, best.indices)


def test_a_frozen_bias() -> None:
    unembed = nn.Linear(WIDTH, VOCAB)
    assert unembed.bias is not None
    model = model_with(unembed)
    unembed.bias.requires_grad_(False)
    labels = torch.randint(VOCAB, (2, 5 + N))
    losses = [model(labels[:, :5], labels, schedule=s).loss for s in ("sequential", "autograd")]
    torch.testing.assert_close(*losses)
    losses[0].backward()
    assert unembed.bias.grad is None and unembed.weight.grad is not None


class Adapter(nn.Linear):
    """A low-rank update beside the weight, as LoRA layers have one."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x.sum(-1, keepdim=True)


def test_an_own_forward_is_refused() -> None:
    model = model_with(Adapter(WIDTH, VOCAB))
    for schedule in ("sequential", "joint", "autograd"):
        with pytest.raises(TypeError, match=r"linear map of its weight and bias.*Adapter"):
            step(model, schedule)
    with pytest.raises(TypeError, match="unembed must be a linear map"):
        model.all_logits(torch.zeros(1, 3, dtype=torch.int64))


@pytest.mark.parametrize(
    "watch",
    [
        lambda m: m.register_forward_hook(lambda module, args, output: output + 1),
        lambda m: m.register_forward_pre_hook(lambda module, args: (2 * args[0],)),
        lambda m: m.register_full_backward_hook(lambda module, gi, go: None),
        lambda m: setattr(m, "forward", lambda x: x),
        lambda m: m.compile(backend="eager"),
    ],
    ids=["hook", "pre-hook", "backward hook", "replaced forward", "compiled"],
)
def test_hooks_are_refused(watch: Any) -> None:
    unembed = nn.Linear(WIDTH, VOCAB, bias=False)
    model = model_with(unembed)
    step(model, "sequential")
    watch(unembed)
    with pytest.raises(TypeError, match="hooks or a replaced forward"):
        step(model, "sequential")


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def test_a_parametrized_weight_is_read_as_computed() -> None:
    unembed = nn.Linear(WIDTH, VOCAB)
    parametrize.register_parametrization(unembed, "weight", Doubled())
    model = model_with(unembed)
    expected, grads = step(model, "autograd")
    for schedule in ("sequential", "joint"):
        found, ours = step(model, schedule)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
        assert all(torch.allclose(a, b, rtol=1e-9) for a, b in zip(ours, grads, strict=True))


def test_an_embedding_and_a_bare_weight() -> None:
    class Weight(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(VOCAB, WIDTH))

    for unembed in (nn.Embedding(VOCAB, WIDTH), Weight()):
        step(model_with(unembed), "sequential")


def test_models_of_the_package_pass(make_model: Any, make_batch: Any) -> None:
    model: MTPModel = make_model(2, tie_embeddings=True)
    tokens, labels = make_batch(2)
    assert model(tokens, labels).loss.isfinite()


@pytest.mark.parametrize("kind", ["composed", "own", "tied"])
def test_a_module_that_heads_read_cannot_be_replaced(kind: str, make_model: Any, make_batch: Any) -> None:
    """The heads would go on reading the old one; its weight can be."""
    model = model_with(nn.Linear(WIDTH, VOCAB)) if kind == "composed" else make_model(N, tie_embeddings=kind == "tied")
    width = model.unembed.weight.shape[1]
    for name in ("unembed",) if kind == "composed" else ("unembed", "embed"):
        old = getattr(model, name)
        for new in (nn.Linear(width, VOCAB + 3).double(), nn.Embedding(VOCAB, width), Adapter(width, VOCAB), None):
            with pytest.raises(ValueError, match=f"{name} must stay the module that the model was built with"):
                setattr(model, name, new)
        setattr(model, name, old)
    model.unembed.weight = nn.Parameter(2 * model.unembed.weight.detach())
    if kind != "tied":
        tokens = torch.zeros(1, 3, dtype=torch.int64)
        torch.testing.assert_close(
            model(tokens), model.unembed(model.heads.run(1, model.trunk(tokens), model.prepare(tokens, None))[1])
        )
