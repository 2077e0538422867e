"""Heads that are a norm alone read the trunk's output once, where a kernel does it; and models whose norms it does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from mtp_ext.nn import MTPModel
from mtp_ext.nn.schedules.head_stack import head_outputs
from tests.nn.conftest import ALL_VARIANTS, SCHEDULES
from tests.support.norm_operators import norms_by_operators

Make = Callable[..., Any]
Error = Callable[[Tensor, Tensor], float]


def step(model: MTPModel, batch: tuple[Tensor, Tensor], **keywords: Any) -> dict[str, Tensor]:
    model.zero_grad()
    loss = model(*batch, **keywords).loss
    loss.backward()
    return {"loss": loss.detach()} | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("variant", ALL_VARIANTS)
def test_a_step_with_norms_by_the_operators(
    variant: str, schedule: str, make_model: Make, make_batch: Make, relative_error: Error
) -> None:
    model, batch = make_model(3, variant=variant, dtype=torch.float32), make_batch(3)
    expected = step(model, batch, schedule="autograd")
    with norms_by_operators() as calls:
        found = step(model, batch, schedule=schedule)
    assert found.keys() == expected.keys() and len(calls) > 0
    for name in expected:
        assert relative_error(found[name], expected[name]) < 2e-5, name


def heads_of_each_call(model: MTPModel, batch: tuple[Tensor, Tensor], **keywords: Any) -> list[int]:
    """How many heads each norm of the heads served; the trunk has no layers."""
    with norms_by_operators() as calls:
        model(*batch, schedule="joint", **keywords)
    return calls


@pytest.fixture
def replicated(make_model: Make) -> MTPModel:
    model = make_model(4, variant="replicated", dtype=torch.float32, n_layers=1)
    model.trunk.layers = nn.ModuleList()
    assert isinstance(model, MTPModel)
    return model


def test_one_read_for_all_heads(replicated: MTPModel, make_batch: Make) -> None:
    batch = make_batch(4)
    assert heads_of_each_call(replicated, batch) == [4]
    assert heads_of_each_call(replicated, batch, head_weights=[1.0, 0.0, 1.0, 0.0]) == [2]
    assert heads_of_each_call(replicated, batch, head_weights=[0.0, 0.0, 1.0, 0.0]) == [1]


def test_heads_that_detach_their_input_run_one_by_one(replicated: MTPModel, make_batch: Make) -> None:
    assert heads_of_each_call(replicated, make_batch(4), detach_heads=(2,)) == [1, 1, 1, 1]


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def hook_a_head(model: MTPModel) -> None:
    model.heads.head(2).register_forward_hook(lambda *args: None)


def hook_a_norm(model: MTPModel) -> None:
    model.heads.head(2).get_submodule("norm").register_full_backward_hook(lambda *args: None)


def parametrize_a_norm(model: MTPModel) -> None:
    parametrize.register_parametrization(model.heads.head(2).get_submodule("norm"), "weight", Doubled())


def put_in_a_block(model: MTPModel) -> None:
    model.heads.head(2).block = nn.Identity()


def put_in_another_norm(model: MTPModel) -> None:
    model.heads.head(2).norm = nn.LayerNorm(16)


def change_an_epsilon(model: MTPModel) -> None:
    model.heads.head(2).get_submodule("norm").eps = 0.5


@pytest.mark.parametrize(
    "change",
    [hook_a_head, hook_a_norm, parametrize_a_norm, put_in_a_block, put_in_another_norm, change_an_epsilon],
)
def test_a_head_with_something_of_its_own_makes_all_run_one_by_one(
    change: Callable[[MTPModel], None], replicated: MTPModel, make_batch: Make, relative_error: Error
) -> None:
    change(replicated)
    batch = make_batch(4)
    assert set(heads_of_each_call(replicated, batch)) == {1}
    expected = step(replicated, batch, schedule="autograd")
    with norms_by_operators():
        found = step(replicated, batch, schedule="joint")
    for name in expected:
        assert relative_error(found[name], expected[name]) < 2e-5, name


def test_a_hook_on_a_head_is_called(replicated: MTPModel, make_batch: Make) -> None:
    calls: list[int] = []
    for k in range(1, 5):
        replicated.heads.head(k).register_forward_hook(lambda *args, k=k: calls.append(k))
    heads_of_each_call(replicated, make_batch(4))
    assert calls == [1, 2, 3, 4]


def test_without_the_kernel_every_head_runs(replicated: MTPModel) -> None:
    hidden = torch.randn(2, 5, 16)
    assert replicated.heads.norm_together((1, 2, 3, 4), hidden) is None
    outputs = head_outputs(replicated.heads, hidden, None)
    with norms_by_operators():
        together = replicated.heads.norm_together((1, 2, 3, 4), hidden)
    assert together is not None and together.keys() == outputs.keys()
    for k in outputs:
        torch.testing.assert_close(together[k], outputs[k])


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["parallel", "replicated"])
def test_logits_of_all_heads_compile_to_one_graph(variant: str, make_model: Make, make_batch: Make) -> None:
    model, (tokens, _) = make_model(2, variant=variant, dtype=torch.float32), make_batch(2)
    expected = model.all_logits(tokens)
    for by_operators in (False, True):
        torch._dynamo.reset()
        compiled = torch.compile(model.all_logits, backend="aot_eager", fullgraph=True)
        if by_operators:
            with norms_by_operators():
                torch.testing.assert_close(compiled(tokens), expected, rtol=1e-5, atol=1e-5)
        else:
            torch.testing.assert_close(compiled(tokens), expected, rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()
