"""``x W^T`` for a few rows on the CPU, where reading the weight takes the time: decoding."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from mtp_ext.ops.common.backend import can_read
from mtp_ext.ops.common.runtime import autocast_dtype

# The most rows for which the kernel (csrc/cpu/few_rows.h) is faster than torch's GEMM, on an EPYC (Zen 4). One row
# takes 0.5 of torch's time in float32 and 0.4 in bfloat16, four rows 0.5 and 0.3, eight 0.5 in both.
LARGEST_ROWS = {torch.float32: 32, torch.bfloat16: 16}


_thread = threading.local()


@contextmanager
def weights_read_once() -> Iterator[None]:
    """A block in which :func:`linear` uses the kernel, in this thread: decoding.

    Elsewhere a forward without a graph keeps the bits of one with a graph, which recomputes it.
    """
    before = getattr(_thread, "reads_once", False)
    _thread.reads_once = True
    try:
        yield
    finally:
        _thread.reads_once = before


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Computes :func:`torch.nn.functional.linear`; in :func:`weights_read_once` a few rows on the CPU without a graph
    read the weight once.

    The result of such a row does not depend on how many other rows there are.

    Args:
        x: ``[..., I]``.
        weight: ``[O, I]``.
        bias: ``[O]``.
    Returns:
        ``[..., O]``.
    """
    if bias is not None or not uses_kernel(x, weight):
        return F.linear(x, weight, bias)
    y: Tensor = torch.ops.mtp_ext._few_rows(x.reshape(-1, x.shape[-1]).contiguous(), weight)
    return y.view(*x.shape[:-1], weight.shape[0])


def uses_kernel(x: Tensor, weight: Tensor) -> bool:
    """Returns True if the kernel supports the product of ``x [..., I]`` and ``weight [O, I]``."""
    return (
        not torch.compiler.is_compiling()
        and getattr(_thread, "reads_once", False)
        and x.device.type == weight.device.type == "cpu"
        and x.dtype == weight.dtype
        and 0 < x.numel() <= LARGEST_ROWS.get(x.dtype, 0) * x.shape[-1]
        and weight.dim() == 2
        and weight.shape[1] == x.shape[-1]
        and weight.is_contiguous()
        and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
        and can_read(x)
        and can_read(weight)
        and autocast_dtype(x) is None
    )


@torch.library.register_fake("mtp_ext::_few_rows")  # type: ignore[untyped-decorator]
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])
