"""``linear``: torch's values, and when the kernel of a few rows takes them."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from mtp_ext.ops.few_rows import LARGEST_ROWS, linear, uses_kernel, weights_read_once

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def _decodes() -> Iterator[None]:
    with weights_read_once():
        yield


def operands(rows: int, width: int, columns: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, width).to(dtype), torch.randn(columns, width).to(dtype)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("sizes", [(1, 8, 3), (4, 33, 70), (7, 1, 1), (5, 512, 300), (40, 16, 9)], ids=str)
def test_values_are_those_of_exact_products(sizes: tuple[int, int, int], dtype: torch.dtype) -> None:
    x, weight = operands(*sizes, dtype)
    exact = F.linear(x.double(), weight.double())
    size = F.linear(x.double().abs(), weight.double().abs())
    bound = size * sizes[1] * torch.finfo(torch.float32).eps + exact.abs() * torch.finfo(dtype).eps
    y = linear(x, weight)
    assert y.dtype == dtype and ((y.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_threads", [1, 2])
def test_a_row_does_not_depend_on_the_others(n_threads: int, dtype: torch.dtype) -> None:
    x, weight = operands(8, 200, 1500, dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    try:
        together = linear(x, weight)
        for i in range(8):
            assert torch.equal(linear(x[i], weight), together[i])
            assert torch.equal(linear(x[i:], weight), together[i:])
    finally:
        torch.set_num_threads(before)


def test_shapes_and_layouts_are_kept() -> None:
    x, weight = torch.randn(2, 3, 20)[..., ::2], torch.randn(7, 10)
    assert uses_kernel(x, weight)
    torch.testing.assert_close(linear(x, weight), F.linear(x, weight))
    torch.testing.assert_close(linear(x[0, 0], weight), F.linear(x[0, 0], weight))


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_the_kernel_takes(dtype: torch.dtype) -> None:
    x, weight = operands(LARGEST_ROWS[dtype], 8, 5, dtype)
    assert uses_kernel(x, weight) and uses_kernel(x[:1], torch.nn.Parameter(weight, requires_grad=False))
    assert not uses_kernel(torch.cat([x, x[:1]]), weight), "more rows"
    assert not uses_kernel(x[:0], weight) and not uses_kernel(x, weight[:, :7]) and not uses_kernel(x, weight.T)
    assert not uses_kernel(x.double(), weight.double()) and not uses_kernel(x.double(), weight)
    with torch.autocast("cpu"):
        assert not uses_kernel(x, weight)
    with FakeTensorMode():
        assert not uses_kernel(torch.empty(2, 8, dtype=dtype), torch.empty(5, 8, dtype=dtype))


def test_a_graph_is_torchs() -> None:
    x, weight = operands(2, 8, 5)
    weight.requires_grad_()
    assert not uses_kernel(x, weight)
    linear(x, weight).sum().backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(weight.grad, x.sum(0).expand(5, -1))
    with torch.no_grad():
        assert uses_kernel(x, weight)


def test_a_bias_and_a_wrong_width_are_torchs() -> None:
    x, weight = operands(2, 8, 5)
    assert torch.equal(linear(x, weight, torch.ones(5)), F.linear(x, weight, torch.ones(5)))
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        linear(x, torch.randn(5, 7))


def test_the_operator_checks_its_arguments() -> None:
    x, weight = operands(2, 8, 5)
    for wrong in ((x, weight.T), (x, weight.bfloat16()), (x[0], weight), (x.double(), weight.double())):
        with pytest.raises(RuntimeError, match="x must be"):
            torch.ops.mtp_ext._few_rows(*wrong)


def test_operations_are_counted() -> None:
    x, weight = operands(3, 8, 5)
    with FlopCounterMode(display=False) as counter:
        linear(x, weight)
    assert counter.get_total_flops() == 2 * 3 * 8 * 5


def test_only_decoding_uses_the_kernel() -> None:
    """A forward without a graph that a schedule recomputes must have the bits of the one with a graph."""
    x, weight = torch.randn(2, 64), torch.randn(96, 64)
    assert uses_kernel(x, weight)
    found: list[bool] = []
    thread = threading.Thread(target=lambda: found.append(uses_kernel(x, weight)))
    thread.start()
    thread.join()
    assert found == [False]
