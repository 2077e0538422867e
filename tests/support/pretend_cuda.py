"""A GPU's path through the Python code, run on CPU tensors: the CUDA backend with stand-ins for its kernels.

What would make the host wait raises an error. The operators that only CUDA has are torch's arithmetic behind the
argument checks of csrc/ops/*_cuda.cpp; those of both devices are the CPU's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mtp_ext.ops.common.backend import KERNEL_DTYPES, CudaBackend, use_backend
from tests.support.norm_operators import norm_backward, norm_forward

WAITS = {"_local_scalar_dense", "nonzero", "equal", "masked_select", "_unique2", "is_nonzero"}


@contextmanager
def pretend_cuda(*, may_wait: bool = False) -> Iterator[None]:
    """CPU tensors take a GPU's path; ``may_wait``: the host may look at values."""
    with use_backend(PretendCuda()), ExitStack() as stack:
        if not may_wait:
            stack.enter_context(_NoWaits())
            for name in ("tolist", "numpy"):
                stack.enter_context(mock.patch.object(Tensor, name, _raises(name)))
            for name in ("tensor", "as_tensor"):
                stack.enter_context(mock.patch.object(torch, name, _only_on_host(getattr(torch, name))))
        yield


class PretendCuda(CudaBackend):
    """CUDA's backend, whose kernels are stand-ins."""

    ops: StandIns

    def __init__(self) -> None:
        super().__init__(is_built=True)
        self.ops = StandIns()

    def matmul_wide_(self, out: Tensor, a: Tensor, b: Tensor, beta: float, alpha: float) -> Tensor:
        assert out.dtype == torch.float32 and a.dtype == b.dtype and a.dtype.itemsize == 2
        return torch.addmm(out, a.float(), b.float(), beta=beta, alpha=alpha, out=out)


class StandIns:
    """The operators of ``torch.ops.mtp_ext`` that a GPU runs."""

    _select_rows = torch.ops.mtp_ext._select_rows

    def _loss_rows_(self, logits: Tensor, rows: Tensor, labels: Tensor, *rest: Any) -> None:
        """The CPU's, on float32 logits: it has no float16."""
        assert logits.dtype in KERNEL_DTYPES and logits.stride(0) >= logits.shape[1]
        assert logits.stride(0) * logits.itemsize % 16 == 0 and logits.data_ptr() % 16 == 0
        wide = logits.float()
        torch.ops.mtp_ext._loss_rows_(wide, rows, labels, *rest)
        logits.copy_(wide)

    def _column_sum_(self, x: Tensor, out: Tensor, accumulate: bool) -> None:
        assert x.dtype in KERNEL_DTYPES and x.dim() == 2 and (x.shape[1] <= 1 or x.stride(1) == 1)
        assert out.dtype == torch.float32 and out.is_contiguous() and out.shape == x.shape[1:]
        out.copy_(x.sum(0, dtype=torch.float32) + (out if accumulate else 0))

    def _scale_into_(self, x: Tensor, scale: Tensor, out: Tensor) -> None:
        assert x.dtype in KERNEL_DTYPES
        assert out.dtype in KERNEL_DTYPES
        assert scale.dtype == torch.float32
        assert x.is_contiguous() and out.is_contiguous() and x.numel() == out.numel() and scale.numel() == 1
        out.copy_(x.float() * scale.view(()))

    def _decode(self, hidden: Tensor, weight: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor]:
        assert hidden.dtype == weight.dtype and hidden.dtype in KERNEL_DTYPES[1:] and hidden.shape[1] % 8 == 0
        assert hidden.is_contiguous() and weight.is_contiguous() and len(hidden) <= 64 and top <= min(16, len(weight))
        logits = hidden.float() @ weight.float().T
        order = logits.sort(dim=-1, descending=True, stable=True)
        return order.values[:, :top], order.indices[:, :top].int(), logits.logsumexp(-1)

    _rms_norm_heads = staticmethod(norm_forward)
    _rms_norm_heads_backward = staticmethod(norm_backward)


class _NoWaits(TorchDispatchMode):
    """Raises for operators whose results a host waits for, in the backward too."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in WAITS:
            raise AssertionError(f"{name} makes the host wait for the device")
        return func(*args, **(kwargs or {}))


def _raises(name: str) -> Any:
    def method(self: Tensor, *args: Any) -> Any:
        raise AssertionError(f"{name} makes the host wait for the device")

    return method


def _only_on_host(make: Any) -> Any:
    def made(data: Any, *args: Any, **kwargs: Any) -> Tensor:
        if kwargs.get("device") is not None:
            raise AssertionError(f"{make.__name__} makes the host wait for the device: use Backend.constants")
        result: Tensor = make(data, *args, **kwargs)
        return result

    return made
