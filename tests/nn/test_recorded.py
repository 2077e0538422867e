"""Models within torch.func, torch.export and make_fx: the gradients of a plain step, with every schedule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from mtp_ext.nn import MTPConfig, MTPModel

VOCAB, SEQ, HEADS = 17, 6, 3
SCHEDULES = ["sequential", "joint", "autograd"]
VARIANTS = ["parallel", "causal", "shared", "replicated", "sequential_modules"]
Gradients = dict[str, Tensor]


class Loss(nn.Module):
    def __init__(self, model: MTPModel, keywords: dict[str, Any]) -> None:
        super().__init__()
        self.model, self.keywords = model, keywords

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        out: Tensor = self.model(tokens, labels, **self.keywords).loss
        return out


def step_of(variant: str, schedule: str) -> tuple[MTPModel, tuple[Tensor, Tensor], dict[str, Any]]:
    model = MTPModel(MTPConfig(VOCAB, 8, 5, 2, n_future=HEADS, variant=variant)).double()
    labels = torch.randint(VOCAB, (2, SEQ + HEADS))
    return model, (labels[:, :SEQ], labels), {"schedule": schedule, "head_weights": [1.0, 0.5, 0.25]}


def gradients(model: nn.Module, loss: Callable[[], Tensor]) -> Gradients:
    model.zero_grad()
    loss().backward()  # type: ignore[no-untyped-call]
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def check_equal(found: Gradients, expected: Gradients) -> None:
    assert found.keys() == expected.keys()
    for name, right in expected.items():
        torch.testing.assert_close(found[name], right, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_functional_gradients(variant: str, schedule: str) -> None:
    model, step, keywords = step_of(variant, schedule)
    expected = gradients(model, lambda: model(*step, **keywords).loss)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    check_equal(grad(lambda p: functional_call(model, p, step, keywords).loss)(parameters), expected)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_gradients_of_each_sample(schedule: str) -> None:
    model, step, keywords = step_of("causal", schedule)
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(p: Gradients, tokens: Tensor, labels: Tensor) -> Tensor:
        out: Tensor = functional_call(model, p, (tokens[None], labels[None]), keywords).loss
        return out

    found = vmap(grad(loss), (None, 0, 0))(parameters, *step)
    for i in range(len(step[0])):
        one = gradients(model, lambda i=i: model(*(x[i : i + 1] for x in step), **keywords).loss)  # type: ignore[misc]
        check_equal({name: g[i] for name, g in found.items()}, one)


@pytest.mark.slow
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "not strict"])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_an_exported_step_trains(variant: str, schedule: str, strict: bool) -> None:
    model, step, keywords = step_of(variant, schedule)
    expected = gradients(model, lambda: model(*step, **keywords).loss)
    exported = torch.export.export(Loss(model, keywords), step, strict=strict).module()
    check_equal(gradients(exported, lambda: exported(*step)), {f"model.{k}": g for k, g in expected.items()})


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_torch_jit_trace(schedule: str) -> None:
    """TorchScript records no list of optional tensors, so the operators are out of its reach."""
    model, step, keywords = step_of("parallel", schedule)
    loss = Loss(model, keywords)
    if schedule != "autograd":
        with pytest.raises(RuntimeError, match=r"torch\.jit\.trace cannot record a loss of mtp_ext"):
            torch.jit.trace(loss, step)
        return
    expected = gradients(model, lambda: loss(*step))
    traced = torch.jit.trace(loss, step)
    check_equal(gradients(model, lambda: traced(*step)), expected)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_written_graph_trains(schedule: str, mode: str) -> None:
    model, step, keywords = step_of("parallel", schedule)
    expected = gradients(model, lambda: model(*step, **keywords).loss)
    parameters = dict(model.named_parameters())

    def loss(p: dict[str, Tensor], *step: Tensor) -> Tensor:
        out: Tensor = functional_call(model, p, step, keywords).loss
        return out

    graph = make_fx(loss, tracing_mode=mode)(parameters, *step)
    check_equal(gradients(model, lambda: graph(parameters, *step)), expected)
