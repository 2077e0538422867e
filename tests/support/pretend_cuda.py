"""A GPU's path through the Python code, run on the CPU: within :func:`pretend_cuda` tensors say that they are on CUDA.

What the host would have to wait for raises an error. The operators that only CUDA has are torch's arithmetic behind the
argument checks of csrc/ops/*_cuda.cpp; those of both devices are the CPU's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from mtp_ext.ops.common import checks
from tests.support.norm_operators import norm_backward, norm_forward

CUDA, CPU = torch.device("cuda:0"), torch.device("cpu")
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WAITS = {"item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__"}
SOURCES = {"tensor", "as_tensor"}  # made on the host, and copied


@contextmanager
def pretend_cuda(*, may_wait: bool = False) -> Iterator[None]:
    """Every tensor is on a CUDA device that the build has kernels for; ``may_wait``: the host may look at values."""
    run_backward, assert_close = torch.autograd._engine_run_backward, torch.testing.assert_close  # type: ignore[attr-defined]

    def in_mode(*args: Any, **kwargs: Any) -> Any:
        with _Mode(
            may_wait
        ):  # torch.autograd.grad and Tensor.backward are functions that the mode handles, without itself
            return run_backward(*args, **kwargs)

    def compare(*args: Any, **kwargs: Any) -> None:
        with torch._C.DisableTorchFunction():  # a test may look at values
            assert_close(*args, **kwargs)

    with (
        mock.patch.object(torch.testing, "assert_close", compare),
        mock.patch.object(checks, "_BACKENDS", ("cpu", "cuda")),
        mock.patch.object(torch.autograd, "_engine_run_backward", in_mode),
        _Mode(may_wait),
    ):
        yield


class _Mode(TorchFunctionMode):
    def __init__(self, may_wait: bool) -> None:
        super().__init__()
        self.may_wait = may_wait

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.__name__
        if name == "__get__":
            answers = {Tensor.is_cuda: True, Tensor.is_cpu: False, Tensor.device: CUDA}
            for attribute, answer in answers.items():
                if func.__self__ is attribute:
                    return answer
        operator = str(func).removeprefix("mtp_ext.").removesuffix(".default")
        if operator in OPERATORS and "mtp_ext" in str(func):
            return OPERATORS[operator](*args, **kwargs)
        if func is torch.device:
            return func(*args, **kwargs)
        on_gpu = any(_is_cuda(x) for x in (*args, *kwargs.values()))
        if not self.may_wait and (name in WAITS or (name in SOURCES and on_gpu)):
            raise AssertionError(f"{name} makes the host wait for the device")
        args, kwargs = [_on_cpu(x) for x in args], {key: _on_cpu(x) for key, x in kwargs.items()}
        if "out_dtype" in kwargs:
            return _product(func, *args, **kwargs)
        return func(*args, **kwargs)


def _is_cuda(x: object) -> bool:
    return (isinstance(x, torch.device) and x.type == "cuda") or (isinstance(x, str) and x.startswith("cuda"))


def _on_cpu(x: Any) -> Any:
    return CPU if _is_cuda(x) else x


def _product(func: Any, *tensors: Tensor, out_dtype: torch.dtype, out: Tensor, **scalars: float) -> Tensor:
    """``mm`` or ``addmm`` of 16-bit matrices with a float32 result."""
    assert out.dtype == out_dtype == torch.float32 and all(x.dtype.itemsize == 2 for x in tensors[-2:])
    assert len(tensors) == 2 or tensors[0].dtype == out_dtype
    result: Tensor = func(*(x.float() for x in tensors), out=out, **scalars)
    return result


def _loss_rows_(logits: Tensor, *rest: Any) -> None:
    """The CPU's, on float32 logits: it has no float16."""
    assert logits.dtype in KERNEL_DTYPES
    *arguments, class_weight_total = rest
    arguments[12] = float(class_weight_total) if class_weight_total is not None else arguments[12]
    wide = logits.float()
    torch.ops.mtp_ext._loss_rows_(wide, *arguments, None)
    logits.copy_(wide)


def _column_sum_(x: Tensor, out: Tensor, accumulate: bool) -> None:
    assert x.dtype in KERNEL_DTYPES and x.dim() == 2 and (x.shape[1] <= 1 or x.stride(1) == 1)
    assert out.dtype == torch.float32 and out.is_contiguous() and out.shape == x.shape[1:]
    out.copy_(x.sum(0, dtype=torch.float32) + (out if accumulate else 0))


def _scale_into_(x: Tensor, scale: Tensor, out: Tensor) -> None:
    assert x.dtype in KERNEL_DTYPES
    assert out.dtype in KERNEL_DTYPES
    assert scale.dtype == torch.float32
    assert x.is_contiguous() and out.is_contiguous() and x.numel() == out.numel() and scale.numel() == 1
    out.copy_(x.float() * scale.view(()))


def _decode(hidden: Tensor, weight: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor]:
    assert hidden.dtype == weight.dtype and hidden.dtype in KERNEL_DTYPES[1:] and hidden.shape[1] % 8 == 0
    assert hidden.is_contiguous() and weight.is_contiguous() and len(hidden) <= 64 and top <= min(16, len(weight))
    logits = hidden.float() @ weight.float().T
    order = logits.sort(dim=-1, descending=True, stable=True)
    return order.values[:, :top], order.indices[:, :top].int(), logits.logsumexp(-1)


OPERATORS: dict[str, Callable[..., Any]] = {
    "_select_rows": torch.ops.mtp_ext._select_rows,
    "_loss_rows_": _loss_rows_,
    "_column_sum_": _column_sum_,
    "_scale_into_": _scale_into_,
    "_decode": _decode,
    "_rms_norm_heads": norm_forward,
    "_rms_norm_heads_backward": norm_backward,
}
