"""The best classes of a few rows; the kernel itself is tested under the emulator and in tests/gpu."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mtp_ext.ops.common.backend import CudaBackend, use_backend
from mtp_ext.ops.top_classes import largest_logits, top_classes, uses_kernel


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("k", [1, 4, 40])
def test_top_classes_are_those_of_the_logits(k: int, dtype: torch.dtype) -> None:
    hidden, weight = torch.randn(5, 16, dtype=dtype), torch.randn(40, 16, dtype=dtype)
    best = top_classes(hidden, weight, k)
    logits = hidden @ weight.T
    assert torch.equal(best.ids, logits.topk(k).indices)
    torch.testing.assert_close(best.logits, logits.topk(k).values)
    torch.testing.assert_close(best.lse, logits.logsumexp(-1))
    values, classes = largest_logits(hidden, weight, k)
    assert torch.equal(values, best.logits) and torch.equal(classes, best.ids)


def test_logits_that_float32_would_make_equal() -> None:
    weight = torch.full((9, 8), 1.0, dtype=torch.float64)
    weight[6] += 1e-12
    assert top_classes(torch.ones(1, 8, dtype=torch.float64), weight, 2).ids.tolist() == [[6, 0]]


@pytest.mark.parametrize("k", [1, 2, 3, 4, 9])
def test_of_equal_logits_the_lowest_class_comes_first(k: int) -> None:
    weight = torch.zeros(9, 8)
    weight[[7, 2, 5]] = 1.0
    assert top_classes(torch.ones(2, 8), weight, k).ids.tolist() == [[2, 5, 7, 0, 1, 3, 4, 6, 8][:k]] * 2


def test_equal_logits_in_one_row_of_many_and_at_the_end_alone() -> None:
    """The first row has no equals among its best; the second's are the k-th and the one after."""
    hidden = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    first = torch.tensor([3.0, 9.0, 1.0, 7.0, 2.0, 5.0])
    second = torch.tensor([0.0, 4.0, 8.0, 4.0, 9.0, 4.0])
    best = top_classes(hidden, torch.stack([first, second], dim=1), 3)
    assert best.ids.tolist() == [[1, 3, 5], [4, 2, 1]]


def test_16_bit_logits_have_many_equals() -> None:
    hidden, weight = torch.randn(3, 16).bfloat16(), torch.randn(2000, 16).bfloat16()
    order = torch.nn.functional.linear(hidden, weight).float().sort(dim=-1, descending=True, stable=True)
    for k in (1, 50, 500):
        best = top_classes(hidden, weight, k)
        assert torch.equal(best.ids, order.indices[:, :k]) and torch.equal(best.logits, order.values[:, :k])


@pytest.mark.parametrize("k", [0, 4])
def test_a_number_of_classes_out_of_range(k: int) -> None:
    with pytest.raises(ValueError, match=f"k must be at least 1 and at most V = 3, got {k}"):
        top_classes(torch.ones(1, 8), torch.ones(3, 8), k)


def takes(rows: int = 64, width: int = 16, k: int = 16, dtype: torch.dtype = torch.bfloat16) -> bool:
    with FakeTensorMode():
        hidden = torch.empty(rows, width, dtype=dtype, device="cuda")
        return uses_kernel(hidden, torch.empty(50, width, dtype=dtype, device="cuda"), k)


def test_what_the_kernel_takes() -> None:
    with use_backend(CudaBackend(is_built=True)):
        assert takes() and takes(dtype=torch.float16) and takes(rows=1, k=1)
        assert not takes(rows=65) and not takes(k=17) and not takes(width=12) and not takes(dtype=torch.float32)
    with use_backend(CudaBackend(is_built=False)):
        assert not takes()


def test_fake_cuda_tensors_trace_without_a_gpu() -> None:
    for rows, dtype in ((5, torch.bfloat16), (5, torch.float32), (65, torch.bfloat16)):
        with use_backend(CudaBackend(is_built=True)), FakeTensorMode():
            weight = torch.empty(50, 16, dtype=dtype, device="cuda")
            best = top_classes(torch.empty(rows, 16, dtype=dtype, device="cuda"), weight, 1)
        assert best.ids.shape == best.logits.shape == (rows, 1) and best.lse.shape == (rows,)
        assert best.ids.dtype == torch.int64 and best.logits.dtype == torch.float32 and best.ids.is_cuda
