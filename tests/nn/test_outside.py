"""Tensors that heads read besides their input and parameters: every schedule gives the same gradient, or refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from mtp_ext.nn import ComposedModel

VOCAB, WIDTH, N = 30, 8, 3


class Trunk(nn.Module):
    """Two layers; ``early`` is the output of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.first, self.second = (
            nn.Embedding(VOCAB, WIDTH),
            nn.Linear(WIDTH, WIDTH),
            nn.Linear(WIDTH, WIDTH),
        )
        self.early: Tensor | None = None

    def forward(self, tokens: Tensor) -> Tensor:
        self.early = torch.tanh(self.first(self.embed(tokens)))
        y: Tensor = self.second(self.early)
        return y


class Reader(nn.Module):
    """A layer that adds what ``read`` gives."""

    def __init__(self, read: Callable[[], Tensor]) -> None:
        super().__init__()
        self.layer, self.read = nn.Linear(WIDTH, WIDTH), read

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x) + self.read()
        return y


def build(make_read: Callable[[Trunk], Callable[[], Tensor]], variant: str = "parallel") -> ComposedModel:
    trunk = Trunk()
    heads = [Reader(make_read(trunk)) for _ in range(N)]
    return ComposedModel(trunk, heads, nn.Linear(WIDTH, VOCAB, bias=False), variant=variant).double()


def gradients(model: ComposedModel, leaves: list[Tensor], schedule: str, **keywords: Any) -> list[Tensor | None]:
    labels = torch.randint(VOCAB, (2, 5 + N), generator=torch.Generator().manual_seed(0))
    loss = model(labels[:, :5], labels, schedule=schedule, **keywords).loss
    return list(torch.autograd.grad(loss, leaves, allow_unused=True))


def assert_schedules_agree(model: ComposedModel, extra: list[Tensor], **keywords: Any) -> None:
    leaves = [*model.parameters(), *extra]
    expected = gradients(model, leaves, "autograd")
    assert all(x is not None for x in expected[len(leaves) - len(extra) :])
    for schedule in ("joint", "sequential"):
        for a, b in zip(gradients(model, leaves, schedule, **keywords), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("variant", ["parallel", "causal", "anticausal"])
@pytest.mark.parametrize("recompute", [False, True])
def test_a_tensor_closed_over(variant: str, recompute: bool) -> None:
    extra = torch.randn(WIDTH, dtype=torch.float64, requires_grad=True)
    model = build(lambda trunk: lambda: extra.square(), variant)
    model.heads.recompute = recompute
    assert_schedules_agree(model, [extra])


def test_parameters_in_a_list() -> None:
    extra = [torch.randn(WIDTH, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert_schedules_agree(build(lambda trunk: lambda: extra[0] * extra[1]), extra)


def test_a_parameter_of_the_trunk() -> None:
    assert_schedules_agree(build(lambda trunk: lambda: trunk.second.bias.double()), [])
    assert_schedules_agree(build(lambda trunk: lambda: trunk.embed.weight[3].exp()), [])


def test_everything_else_is_frozen() -> None:
    extra = torch.randn(WIDTH, dtype=torch.float64, requires_grad=True)
    model = build(lambda trunk: lambda: extra * 2).requires_grad_(False)
    assert gradients(model, [extra], "joint")[0] is not None
    with pytest.raises(RuntimeError, match="head 1 reads a tensor that requires grad, though neither its input nor"):
        gradients(model, [extra], "sequential")


def test_a_skip_from_an_early_layer_is_refused_by_name() -> None:
    def read_early(trunk: Trunk) -> Callable[[], Tensor]:
        def read() -> Tensor:
            assert trunk.early is not None
            return trunk.early

        return read

    model = build(read_early)
    assert gradients(model, list(model.parameters()), "joint")[0] is not None
    message = r"head 1 reads a tensor \[2, 5, 8\] \(from TanhBackward0\).*use schedule='joint'"
    with pytest.raises(RuntimeError, match=message):
        gradients(model, list(model.parameters()), "sequential")


def test_detached_it_is_read() -> None:
    assert_schedules_agree(build(lambda trunk: lambda: trunk.early.detach()), [])  # type: ignore[union-attr]


def test_a_computed_constant_of_the_user_is_refused() -> None:
    extra = torch.randn(WIDTH, dtype=torch.float64, requires_grad=True)
    computed = extra.exp()
    with pytest.raises(RuntimeError, match=r"head 1 reads a tensor \[8\] \(from ExpBackward0\)"):
        gradients(build(lambda trunk: lambda: computed), [extra], "sequential")


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def test_cached_parametrizations() -> None:
    """Within ``cached()`` the first head computes a weight that the second one reads."""
    shared = nn.Linear(WIDTH, WIDTH)
    parametrize.register_parametrization(shared, "weight", Doubled())
    model = ComposedModel(
        Trunk(), [nn.Sequential(shared) for _ in range(N)], nn.Linear(WIDTH, VOCAB, bias=False)
    ).double()
    assert_schedules_agree(model, [])
    with parametrize.cached(), pytest.raises(RuntimeError, match=r"head \d reads a tensor"):
        gradients(model, list(model.parameters()), "sequential")


def test_under_autocast_the_cast_of_a_leaf_is_no_outside_graph() -> None:
    extra = torch.randn(WIDTH, WIDTH, requires_grad=True)

    def read() -> Tensor:
        return torch.ones(1, WIDTH) @ extra

    class Casting(Trunk):
        def forward(self, tokens: Tensor) -> Tensor:
            y: Tensor = super().forward(tokens) + torch.ones(1, WIDTH) @ extra  # casts it, and autocast keeps the cast
            return y

    model = ComposedModel(Casting(), [Reader(read) for _ in range(N)], nn.Linear(WIDTH, VOCAB, bias=False))
    found = {}
    for schedule in ("sequential", "joint"):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found[schedule] = gradients(model, [extra], schedule)[0]
    torch.testing.assert_close(found["sequential"], found["joint"], rtol=0.05, atol=0.05)
