"""The rule that judges 16-bit results: it passes honest ones, always, and catches defects, large and small."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch

from mtp_ext.ops.common.backend import Backend, CpuBackend, use_backend
from tests.support.accuracy import assert_accurate, floor, rounding_bounds
from tests.support.loss_calls import CPU, Call, Results, make_generator, run

DRAWS, DEFECTS = 1000, 100
OPTIONS = (
    {},
    {"label_smoothing": 0.1},
    {"z_loss": 1e-2},
    {"softcap": 5.0},
    {"logit_scale": -1.5},
    {"reduction": "sum"},
)


@pytest.fixture(params=[True, False], ids=["16-bit logits", "float32 logits"])
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    with use_backend(chosen := CpuBackend(fast_bfloat16=request.param)):
        yield chosen


def draw(seed: int) -> Call:
    """A call with 1 to 3 heads, up to 20 rows each, 2 to 300 classes, a width of 1 to 40, and one option."""
    g = make_generator(seed)

    def between(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=g))

    n, batch, seq, width, vocab = between(1, 3), between(1, 2), between(1, 10), between(1, 40), between(2, 300)
    labels = torch.randint(vocab, (batch, seq + n), generator=g)
    if between(0, 1):
        labels[:, 2::3] = -100
    tensors = {
        "hidden": torch.randn(n, batch, seq, width, generator=g, dtype=torch.float64),
        "weight": torch.randn(vocab, width, generator=g, dtype=torch.float64) * (0.1, 1.0)[between(0, 1)],
        "labels": labels,
    }
    dtype = (torch.bfloat16, torch.float16)[between(0, 1)]
    return Call(dtype, tensors, dict(OPTIONS[seed % len(OPTIONS)]), heads=True, gradient_seed=seed)


@pytest.mark.slow
def test_honest_results_pass(backend: Backend) -> None:
    for seed in range(DRAWS):
        assert_accurate(draw(seed))


def test_a_defect_of_three_bounds_is_caught(backend: Backend) -> None:
    """In one element of one result, in turn."""
    for seed in range(DEFECTS):
        call = draw(seed)
        exact, ours = run(call, torch.float64, ours=False), run(call, call.dtype, ours=True)
        bounds = rounding_bounds(call, exact, backend.logits_dtype(call.dtype))
        names = [("values", name) for name in ours.values] + [("grads", name) for name in ours.grads]
        kind, name = names[seed % len(names)]
        result, expected = getattr(ours, kind)[name].detach().double(), getattr(exact, kind)[name].detach()
        bound = (getattr(bounds, kind)[name] + floor(result.dtype, expected.abs(), CPU)).expand_as(result)
        at = seed % result.numel()
        result.view(-1)[at] += (-1) ** seed * 3 * bound.reshape(-1)[at]
        getattr(ours, kind)[name] = result
        with pytest.raises(AssertionError, match="above its bound"):
            assert_accurate(call, ours)


def first_target_lost(call: Call) -> Results:
    """The results of a loss that leaves one row out."""
    labels = call.tensors["labels"].clone()
    labels[0, 1] = -100
    return run(replace(call, tensors=call.tensors | {"labels": labels}), call.dtype, ours=True)


def smoothed(call: Call) -> Results:
    return run(replace(call, options=call.options | {"label_smoothing": 0.02}), call.dtype, ours=True)


def scaled(call: Call) -> Results:
    return run(replace(call, options=call.options | {"logit_scale": 1.02}), call.dtype, ours=True)


def a_class_lost(call: Call) -> Results:
    """The results of a loss that does not see a class that is nobody's target."""
    bias = torch.zeros(call.tensors["weight"].shape[0], dtype=torch.float64)
    bias[17] = -1e4
    call.tensors["labels"][call.tensors["labels"] == 17] = 18
    return run(replace(call, tensors=call.tensors | {"bias": bias}), call.dtype, ours=True)


@pytest.mark.parametrize("defect", [first_target_lost, smoothed, scaled, a_class_lost], ids=lambda f: f.__name__)
def test_small_defects_are_caught(backend: Backend, defect: Callable[[Call], Results]) -> None:
    """No wrong loss fits into the bounds: 1 row of 120 lost, 2 % of smoothing, 2 % of scale, 1 of 200 classes lost."""
    call = draw(0)
    g = make_generator(1)
    call.tensors = {
        "hidden": torch.randn(2, 2, 30, 32, generator=g, dtype=torch.float64),
        "weight": torch.randn(200, 32, generator=g, dtype=torch.float64) * 0.2,
        "labels": torch.randint(200, (2, 32), generator=g),
    }
    call = replace(call, dtype=torch.bfloat16, wanted=("hidden", "weight"))
    ours = defect(call)
    assert_accurate(call)
    ours.exact = run(call, torch.float64, ours=False).exact
    ours.grads.pop("bias", None)
    with pytest.raises(AssertionError, match="above its bound"):
        assert_accurate(call, ours)
