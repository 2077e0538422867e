"""The divisors of means: normalizers that are none, weights without a sum, float16 gradients behind large ones."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from mtp_ext import debug_checks, linear_cross_entropy, multi_token_cross_entropy
from mtp_ext.nn import MTPConfig, MTPModel
from mtp_ext.ops import reference
from mtp_ext.ops.common.backend import CpuBackend, use_backend
from tests.support.pretend_cuda import pretend_cuda

N, B, S, D, V = 2, 2, 6, 8, 17
WRONG = [0, -3.0, math.nan, math.inf]
SCHEDULES = ["sequential", "joint", "autograd"]


def leaves() -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight = torch.randn(N, B, S, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
    return hidden, weight, torch.randint(V, (B, S + N))


@pytest.fixture(params=["native", "row loop", "pretended GPU"])
def device(request: pytest.FixtureRequest) -> Iterator[AbstractContextManager[None]]:
    native = {"native": True, "row loop": False}.get(request.param)
    yield pretend_cuda() if native is None else use_backend(CpuBackend(native_loss=native))


def make_model(variant: str = "parallel") -> MTPModel:
    return MTPModel(MTPConfig(V, D, 4 if variant == "parallel" else 2, 2, n_future=N, variant=variant))


@pytest.mark.parametrize("as_tensor", [False, True], ids=["number", "tensor"])
@pytest.mark.parametrize("value", WRONG)
def test_a_normalizer_that_divides_nothing_is_refused(value: float, as_tensor: bool) -> None:
    normalizer = torch.tensor(value) if as_tensor else value
    hidden, weight, labels = leaves()
    for reduction in ("mean", "sum", "none"):
        with pytest.raises(ValueError, match=f"normalizer must be positive and finite, got {value:g}"):
            multi_token_cross_entropy(hidden, weight, labels, normalizer=normalizer, reduction=reduction)
    for schedule in SCHEDULES:
        with pytest.raises(ValueError, match="normalizer must be positive and finite"):
            make_model()(labels[:, :S], labels, schedule=schedule, normalizer=normalizer)


@pytest.mark.parametrize("value", WRONG)
def test_a_gpus_normalizer_that_divides_nothing_makes_the_loss_nan(value: float) -> None:
    hidden, weight, labels = leaves()
    models = [make_model(), make_model("shared")]
    with pretend_cuda():
        normalizer = torch.tensor(value)
        found = [multi_token_cross_entropy(hidden, weight, labels, normalizer=normalizer)]
        found += [
            model(labels[:, :S], labels, schedule=schedule, normalizer=normalizer)
            for model in models
            for schedule in SCHEDULES
        ]
    assert all(x.loss.isnan() and x.head_loss.isnan().all() for x in found)
    before = debug_checks(True)
    try:
        with pretend_cuda(may_wait=True), pytest.raises(ValueError, match="normalizer must be positive and finite"):
            multi_token_cross_entropy(hidden, weight, labels, normalizer=normalizer)
    finally:
        debug_checks(before)


@pytest.mark.slow
def test_a_compiled_call_refuses_a_normalizer_too() -> None:
    @torch.compile(fullgraph=True, backend="aot_eager")
    def loss(hidden: Tensor, weight: Tensor, labels: Tensor, normalizer: Tensor) -> Tensor:
        return multi_token_cross_entropy(hidden, weight, labels, normalizer=normalizer).loss

    assert loss(*leaves(), torch.tensor(3)).isfinite()
    with pytest.raises(ValueError, match="normalizer must be positive and finite, got -3"):
        loss(*leaves(), torch.tensor(-3))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float64, torch.bfloat16])
def test_a_normalizer_of_any_dtype(device: AbstractContextManager[None], dtype: torch.dtype) -> None:
    arguments = leaves()
    expected = multi_token_cross_entropy(*arguments, normalizer=5).loss
    normalizer = torch.tensor(5, dtype=dtype)
    with device:
        found = multi_token_cross_entropy(*arguments, normalizer=normalizer).loss
    torch.testing.assert_close(found, expected)


OPTIONS: list[dict[str, Any]] = [{}, {"z_loss": 0.1}, {"label_smoothing": 0.2}, {"softcap": 3.0, "z_loss": 0.1}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", ["token_weights", "class_weights", "both"])
def test_targets_without_weight_have_loss_zero(
    device: AbstractContextManager[None], name: str, options: dict[str, Any]
) -> None:
    """Smoothing and the z term have no weight of their own: divided by 1 they were as large as a sum over the batch."""
    hidden, weight, labels = leaves()
    token_weights, class_weights = torch.rand(labels.shape), torch.rand(V)
    if name == "both":  # where a token has weight, its class has none
        class_weights[: V // 2] = 0
        token_weights.masked_fill_(labels >= V // 2, 0)
    else:
        {"token_weights": token_weights, "class_weights": class_weights}[name].zero_()
    arguments = options | {"token_weights": token_weights, "class_weights": class_weights}
    with device:
        heads = multi_token_cross_entropy(hidden, weight, labels, **arguments)
        arguments["token_weights"] = token_weights[:, :S]
        one, lse = linear_cross_entropy(hidden[0], weight, labels[:, :S], return_lse=True, **arguments)
        grads = torch.autograd.grad(heads.loss + one, (hidden, weight))
    assert heads.loss == 0 and not heads.head_loss.any() and one == 0 and lse.isfinite().all()
    assert not any(g.any() for g in grads)


@pytest.mark.parametrize("name", ["token_weights", "class_weights"])
def test_weights_that_cancel_give_nan(device: AbstractContextManager[None], name: str) -> None:
    """Their mean is not defined. Only the head that they belong to is lost, and only where it is a mean."""
    hidden, weight, _ = leaves()
    signs = torch.tensor([0, 1]).repeat(B, (S + N) // 2)  # S targets of head 1, S - 1 of head 2
    labels = signs.index_fill(1, torch.tensor([S + 1]), -100)
    arguments = {name: 2.0 - 4.0 * (signs if name == "token_weights" else torch.arange(V))}
    with device:
        mean, total = (
            multi_token_cross_entropy(hidden, weight, labels, reduction=reduction, **arguments)
            for reduction in ("mean", "sum")
        )
        (grad,) = torch.autograd.grad(mean.loss, hidden)
    assert mean.loss.isnan() and mean.head_loss.isnan().tolist() == [True, False]
    assert grad[0].isnan().any() and grad[1].isfinite().all() and total.loss.isfinite()
    expected = reference.multi_token_cross_entropy(hidden, weight, labels, **arguments)
    torch.testing.assert_close(mean.head_loss, expected.head_loss, equal_nan=True)


SMALL_WEIGHTS: dict[str, dict[str, Any]] = {
    "a mean": {},
    "a number": {"normalizer": 1e6},
    "a large number": {"normalizer": 1e8},
    "a tensor": {"normalizer": torch.tensor(1e6)},
    "an integer tensor": {"normalizer": torch.tensor(3_000_000), "head_weights": [1.0, 0.1]},
    "token weights": {"reduction": "sum", "token_weights": 1e-6 * torch.rand(8, 66)},
    "both": {"normalizer": torch.tensor(100.0), "token_weights": 1e-5 * torch.rand(8, 66)},
}


@pytest.mark.parametrize("name", SMALL_WEIGHTS)
def test_float16_gradients_do_not_underflow(name: str) -> None:
    """Of logits that a GPU holds in float16; p / 10^6 is below its smallest number where p < 3 %."""
    inputs = torch.randn(2, 8, 64, 32).half(), (0.1 * torch.randn(500, 32)).half()
    labels, options, found = torch.randint(500, (8, 66)), SMALL_WEIGHTS[name], []
    for function, dtype in ((reference.multi_token_cross_entropy, torch.float64), (multi_token_cross_entropy, None)):
        made = [x.to(dtype or x.dtype).requires_grad_() for x in inputs]
        with nullcontext() if dtype else pretend_cuda():
            loss = function(*made, labels, **options).loss
            found.append(torch.autograd.grad(2.0**20 * loss, made))
    for expected, ours in zip(*found, strict=True):
        assert (ours.double() - expected).norm() <= 2**-11 * expected.norm()


def test_a_float16_gradient_buffer_and_no_rows() -> None:
    weight, buffer = torch.randn(V, D).half().requires_grad_(), torch.zeros(V, D)
    hidden, normalizer = torch.randn(1, B, S, D).half(), torch.tensor(1e6)
    labels = torch.randint(V, (B, S + 1))
    with pretend_cuda():
        multi_token_cross_entropy(hidden, weight, labels, normalizer=normalizer, grad_weight_out=buffer).loss.backward()
        loss = multi_token_cross_entropy(hidden[:, :0], weight, labels[:0], normalizer=normalizer).loss
        (nothing,) = torch.autograd.grad(loss, weight)
    exact = weight.detach().double().requires_grad_()
    reference.multi_token_cross_entropy(hidden.double(), exact, labels, normalizer=1e6).loss.backward()
    assert exact.grad is not None and (buffer - exact.grad).norm() <= 2e-3 * exact.grad.norm()
    assert loss == 0 and not nothing.any()
