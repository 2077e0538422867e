"""The path that norms take on a GPU, on the CPU: its operators are run by torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor

from mtp_ext.nn.heads import heads
from mtp_ext.ops import rms_norm


@contextmanager
def norms_by_operators() -> Iterator[list[int]]:
    """Every norm goes through the operators; gives the number of heads of each call of the forward's."""
    calls: list[int] = []

    def forward(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        calls.append(len(weight))
        return norm_forward(x, residual, weight, eps)

    with (
        torch.library._scoped_library("mtp_ext", "IMPL") as library,
        mock.patch.object(rms_norm, "uses_kernel", lambda x, weight: True),
        mock.patch.object(heads, "rms_norm_uses_kernel", lambda x, weight: True),
    ):
        library.impl("_rms_norm_heads", forward, "CPU")
        library.impl("_rms_norm_heads_backward", norm_backward, "CPU")
        yield calls


def norm_forward(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """csrc/kernels/rms_norm.h, in torch."""
    assert x.is_contiguous() and weight.is_contiguous() and weight.dtype == torch.float32
    h = x if residual is None else x + residual
    rstd = (h.float().square().mean(-1) + eps).rsqrt()
    y = (h.float() * rstd[:, None] * weight[:, None]).to(x.dtype)
    return y, x.new_empty(0, x.shape[1]) if residual is None else h.clone(), rstd


def norm_backward(
    grad_y: Tensor, h: Tensor, grad_h: Tensor | None, weight: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    """Its backward."""
    assert grad_y.is_contiguous() and h.is_contiguous() and (grad_h is None or grad_h.is_contiguous())
    assert grad_y.dtype == h.dtype
    normed, grad_y = h.float() * rstd[:, None], grad_y.float()
    g = (weight[:, None] * grad_y).sum(0)
    grad_x = rstd[:, None] * (g - normed * (g * normed).mean(-1, keepdim=True))
    return (grad_x if grad_h is None else grad_x + grad_h).to(h.dtype), (grad_y * normed).sum(1)
