"""RMSNorm of several heads: the plain path, and the kernel's path with the operators' formula run by torch on the CPU.

The kernel itself is tested under the emulator and in tests/gpu.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mtp_ext.ops import rms_norm as module
from mtp_ext.ops.common.backend import CudaBackend, use_backend
from mtp_ext.ops.rms_norm import rms_norm, rms_norm_heads, uses_kernel
from tests.support.norm_operators import norms_by_operators

EPS = 1e-3
KERNEL_DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def operands(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return torch.randn(2, 3, 8, dtype=dtype, requires_grad=True), torch.randn(4, 8, dtype=dtype, requires_grad=True)


def compare(x: Tensor, weights: Tensor, tolerance: float) -> None:
    """Outputs and gradients against torch's own."""
    y = rms_norm_heads(x, weights, EPS)
    want = torch.stack([F.rms_norm(x, (x.shape[-1],), w, EPS) for w in weights])
    torch.testing.assert_close(y, want, rtol=tolerance, atol=tolerance)
    g = torch.randn_like(y)
    found = torch.autograd.grad(y, (x, weights), g)
    expected = torch.autograd.grad(want, (x, weights), g)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.fixture
def kernel_on_cpu() -> Iterator[None]:
    with norms_by_operators():
        yield


def test_the_plain_path_is_torchs() -> None:
    compare(*operands(), 1e-12)


@pytest.mark.parametrize("n_heads", [1, 4])
def test_the_kernels_path_is_torchs(kernel_on_cpu: None, n_heads: int) -> None:
    x, weights = operands(torch.float32)
    compare(x, weights[:n_heads], 1e-5)


def test_the_kernels_path_takes_what_is_not_contiguous_and_no_rows(kernel_on_cpu: None) -> None:
    x = torch.randn(8, 3, 2).requires_grad_()
    compare(x.permute(2, 1, 0), torch.rand(2, 8).requires_grad_(), 1e-5)
    empty = torch.zeros(2, 0, 8, requires_grad=True)
    y = rms_norm(empty, torch.ones(8), EPS)
    y.sum().backward()
    assert y.shape == (2, 0, 8) and empty.grad is not None


def test_the_kernels_path_gives_a_weight_its_own_dtype(kernel_on_cpu: None) -> None:
    x, weight = torch.randn(3, 8), torch.rand(8, dtype=torch.bfloat16, requires_grad=True)
    rms_norm(x, weight, EPS).sum().backward()
    assert weight.grad is not None and weight.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("frozen", ["x", "weights"])
def test_the_kernels_path_honours_what_is_frozen(kernel_on_cpu: None, frozen: str) -> None:
    named = dict(zip(("x", "weights"), operands(torch.float32), strict=True))
    named[frozen].requires_grad_(False)
    rms_norm_heads(named["x"], named["weights"], EPS).sum().backward()
    assert {name for name, t in named.items() if t.grad is not None} == named.keys() - {frozen}


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_the_kernels_path_compiles_to_one_graph(kernel_on_cpu: None, backend: str) -> None:
    def function(x: Tensor, weights: Tensor) -> Tensor:
        return rms_norm_heads(x, weights, EPS).square().sum() + rms_norm(x, weights[0], EPS).sin().sum()

    compiled = torch.compile(function, fullgraph=True, backend=backend)
    inputs = operands(torch.float32)
    loss, value = function(*inputs), compiled(*inputs)
    torch.testing.assert_close(value, loss)
    pairs = zip(torch.autograd.grad(value, inputs), torch.autograd.grad(loss, inputs), strict=True)
    for ours, eager in pairs:
        torch.testing.assert_close(ours, eager)


def test_the_fakes_have_the_operators_shapes(kernel_on_cpu: None) -> None:
    x, weights = (t.detach() for t in operands(torch.float32))
    rows = x.flatten(0, 1)
    ops, utilities = torch.ops.mtp_ext, ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(ops._rms_norm_heads.default, (rows, weights, EPS), test_utils=utilities)
    y, rstd = ops._rms_norm_heads(rows, weights, EPS)
    arguments = (torch.randn_like(y), rows, weights, rstd)
    torch.library.opcheck(ops._rms_norm_heads_backward.default, arguments, test_utils=utilities)


def takes(*shape: int, dtype: torch.dtype, weight_dtype: torch.dtype, device: str = "cuda") -> bool:
    with FakeTensorMode():
        x = torch.empty(shape, dtype=dtype, device=device)
        return uses_kernel(x, torch.empty(shape[-1], dtype=weight_dtype, device=device))


def test_what_the_kernel_takes() -> None:
    with use_backend(CudaBackend(is_built=True)):
        for dtype in KERNEL_DTYPES:
            assert takes(2, 3, 16, dtype=dtype, weight_dtype=torch.float32)
            assert takes(2, 3, 16, dtype=dtype, weight_dtype=dtype)
        assert not takes(2, 16, dtype=torch.float64, weight_dtype=torch.float64)
        assert not takes(2, 16, dtype=torch.float32, weight_dtype=torch.bfloat16)
        assert takes(2, 12, dtype=torch.float32, weight_dtype=torch.float32)
        assert not takes(2, 12, dtype=torch.bfloat16, weight_dtype=torch.float32), "24 bytes are no whole vectors"
        assert not takes(2, 2 * module.LARGEST_WIDTH, dtype=torch.bfloat16, weight_dtype=torch.float32)
    assert not takes(2, 16, dtype=torch.float32, weight_dtype=torch.float32, device="cpu")
    with use_backend(CudaBackend(is_built=False)):
        assert not takes(2, 16, dtype=torch.float32, weight_dtype=torch.float32)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_fake_cuda_tensors_trace_the_kernels_path(dtype: torch.dtype) -> None:
    with use_backend(CudaBackend(is_built=True)), FakeTensorMode(), torch.no_grad():
        x, weights = torch.empty(2, 3, 16, dtype=dtype, device="cuda"), torch.empty(4, 16, device="cuda")
        y = rms_norm_heads(x, weights, EPS)
        one = rms_norm(x, torch.empty(16, device="cuda"), EPS)
    assert y.shape == (4, 2, 3, 16) and one.shape == (2, 3, 16)
    assert y.dtype == one.dtype == dtype and y.is_cuda and one.is_cuda


def test_errors_name_the_argument() -> None:
    x = torch.randn(2, 8)
    with pytest.raises(ValueError, match=r"weights must be \[n, D\] with n >= 1 and D = 8, got float32 \[8\]"):
        rms_norm_heads(x, torch.ones(8), EPS)
    with pytest.raises(ValueError, match=r"weights must be .* got float32 \[2, 7\]"):
        rms_norm_heads(x, torch.ones(2, 7), EPS)
