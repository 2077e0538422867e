"""A weight gradient that a single chunk of bfloat16 rows gives is stored in bfloat16 at once, without a float32 sum."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from mtp_ext import linear_cross_entropy, multi_token_cross_entropy
from mtp_ext.ops import reference
from mtp_ext.ops.common.backend import CpuBackend, use_backend
from tests.support.pretend_cuda import pretend_cuda

N, B, S, D, V = 3, 2, 10, 16, 50
FAST = {
    "native": lambda: use_backend(CpuBackend(fast_bfloat16=True)),
    "loop": lambda: use_backend(CpuBackend(native_loss=False, fast_bfloat16=True)),
    "cuda": partial(pretend_cuda, may_wait=True),
}


@pytest.fixture(params=FAST)
def fast_bfloat16(request: pytest.FixtureRequest) -> Iterator[None]:
    """Multiplies bfloat16 as it is, as a processor or GPU with such instructions does."""
    with FAST[request.param]():
        yield


def inputs(dtype: torch.dtype = torch.bfloat16, *, replicated: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    hidden = torch.randn(N, B, S, D, dtype=dtype, requires_grad=True)
    weight = torch.randn((N, V, D) if replicated else (V, D), dtype=dtype, requires_grad=True)
    return hidden, weight, torch.randint(V, (B, S + N))


def held_dtype(loss: Tensor) -> torch.dtype:
    """The dtype in which the weight's gradient waits for backward."""
    assert loss.grad_fn is not None
    dtype: torch.dtype = loss.grad_fn.saved_tensors[0].dtype  # type: ignore[attr-defined]
    return dtype


@pytest.mark.usefixtures("fast_bfloat16")
@pytest.mark.parametrize("incoming", [1.0, 3.0])
@pytest.mark.parametrize("options", [{}, {"detach_weight": (1, 2)}, {"chunk_rows": 7}, {"softcap": 5.0}], ids=str)
@pytest.mark.parametrize("replicated", [False, True])
def test_the_gradient_is_that_of_float64(incoming: float, options: dict[str, Any], replicated: bool) -> None:
    """Within four roundings of 2**-8 of the sum of magnitudes: of the logits, of their gradient, of the product, and of
    the result times the incoming gradient."""
    hidden, weight, labels = inputs(replicated=replicated)
    loss = multi_token_cross_entropy(hidden, weight, labels, **options).loss
    sums_in_float32 = "chunk_rows" in options or ("detach_weight" in options and not replicated)
    assert held_dtype(loss) == (torch.float32 if sums_in_float32 else torch.bfloat16)
    grad_hidden, grad_weight = torch.autograd.grad(loss * incoming, (hidden, weight))
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    kept = {name: value for name, value in options.items() if name != "chunk_rows"}
    expected = torch.autograd.grad(reference.multi_token_cross_entropy(*exact, labels, **kept).loss * incoming, exact)
    # |dZ| sums to at most 2 a row, before head divisors.
    magnitude = incoming * 2 * N * hidden.abs().amax().item()
    assert grad_weight.dtype == torch.bfloat16 and grad_hidden.dtype == torch.bfloat16
    assert (grad_weight.double() - expected[1]).abs().max() <= 4 * 2**-8 * magnitude
    assert (grad_weight.double() - expected[1]).abs().mean() <= 2**-8 * expected[1].abs().max()


@pytest.mark.usefixtures("fast_bfloat16")
def test_what_needs_float32_keeps_it() -> None:
    """A buffer, the float32 weight of autocast, and float16, whose scale is known in backward only."""
    hidden, weight, labels = inputs()
    buffer = torch.zeros(V, D)
    loss = multi_token_cross_entropy(hidden, weight, labels, grad_weight_out=buffer).loss
    loss.backward()  # type: ignore[no-untyped-call]
    assert weight.grad is None and bool(buffer.any())
    hidden, weight, labels = inputs(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = multi_token_cross_entropy(hidden, weight, labels).loss
    assert held_dtype(loss) == torch.float32
    assert torch.autograd.grad(loss, weight)[0].dtype == torch.float32
    hidden, weight, labels = inputs(torch.float16)
    assert held_dtype(multi_token_cross_entropy(hidden, weight, labels).loss) == torch.float32


@pytest.mark.usefixtures("fast_bfloat16")
@pytest.mark.parametrize("ignored", ["all", "head 1", "none"])
def test_heads_without_targets(ignored: str) -> None:
    hidden, weight, labels = inputs(replicated=True)
    if ignored == "all":
        labels.fill_(-100)
    documents = torch.arange(S + N).expand(B, -1) if ignored == "head 1" else None
    loss = multi_token_cross_entropy(hidden, weight, labels, document_ids=documents).loss
    grad = torch.autograd.grad(loss, weight)[0]
    assert bool(grad.isfinite().all())
    assert grad.flatten(1).any(1).tolist() == [ignored == "none"] * N


def test_rows_beyond_a_chunk_share_one_if_the_float32_sum_would_be_larger() -> None:
    """The chunk's limit is 2,048 rows; D = 100 more take less memory than the float32 sum."""
    for rows, held in ((2148, torch.bfloat16), (2149, torch.float32)):
        hidden = torch.randn(rows, 100, dtype=torch.bfloat16, requires_grad=True)
        weight = torch.randn(20_000, 100, dtype=torch.bfloat16, requires_grad=True)
        with use_backend(CpuBackend(fast_bfloat16=True)):
            loss = linear_cross_entropy(hidden, weight, torch.full((rows,), -100))
        assert isinstance(loss, Tensor) and held_dtype(loss) == held
