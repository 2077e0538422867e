"""The operators that only CUDA has, against plain torch in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from mtp_ext.ops.common.backend import backend_of
from mtp_ext.ops.loss.arguments import LossCall
from mtp_ext.ops.loss.row_kernels import select_rows
from mtp_ext.ops.top_classes import top_classes, uses_kernel
from tests.gpu.registry import check

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@check(small=True)
def selected_rows_equal_the_cpus(device: torch.device) -> None:
    g = torch.Generator().manual_seed(0)
    for heads, batch, seq in ((1, 1, 1), (3, 2, 63), (4, 3, 5000)):
        labels = torch.randint(100, (batch, seq + heads), generator=g)
        labels[torch.rand(labels.shape, generator=g) < 0.3] = -100
        documents = torch.arange(seq + heads).div(9, rounding_mode="floor").repeat(batch, 1)

        found = []
        for on in (device, torch.device("cpu")):
            call = LossCall(labels.to(on), seq, heads, 1, torch.float32, document_ids=documents.to(on))
            selected = [select_rows(call, 90, marked=marked) for marked in (False, True)]
            found.append([x.tolist() for x in (*selected[0], *selected[1])])
        assert found[0] == found[1]


@check(small=True)
def column_sums(device: torch.device) -> None:
    ops = backend_of(device).ops
    for dtype in DTYPES:
        for rows, columns in ((1, 1), (17, 1003), (100, 4096)):
            x = torch.randn(rows, columns, device=device).to(dtype)
            out = torch.full((columns,), 3.0, device=device)
            ops._column_sum_(x, out, True)
            torch.testing.assert_close(out.double(), 3 + x.double().sum(0), rtol=1e-5, atol=1e-4)
            ops._column_sum_(x[:, 1:], out[:-1].clone(), False)


@check(small=True)
def scaling_by_a_device_scalar(device: torch.device) -> None:
    ops = backend_of(device).ops
    for source in DTYPES:
        for target in DTYPES:
            x = torch.randn(10_001, device=device).to(source)
            out = torch.empty(10_001, device=device, dtype=target)
            ops._scale_into_(x, torch.tensor([0.3], device=device), out)
            assert torch.equal(out, (x.float() * torch.tensor(0.3, device=device)).to(target))


@check(small=True)
def norms_of_several_heads(device: torch.device) -> None:
    ops = backend_of(device).ops
    for dtype in DTYPES:
        x = torch.randn(37, 264, device=device).to(dtype)
        weight = torch.rand(3, 264, device=device) + 0.5
        y, rstd = ops._rms_norm_heads(x, weight, 1e-5)
        exact = x.double().requires_grad_()
        exact_weight = weight.double().requires_grad_()
        normed = exact * (exact.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
        expected = normed[None] * exact_weight[:, None]
        bound = ROUNDING[dtype]
        torch.testing.assert_close(y.double(), expected.detach(), rtol=bound, atol=bound)
        grad_y = torch.randn_like(y)
        grad_x, grad_weight = ops._rms_norm_heads_backward(grad_y, x, weight, rstd)
        expected_x, expected_weight = torch.autograd.grad(expected, (exact, exact_weight), grad_y.double())
        torch.testing.assert_close(grad_x.double(), expected_x, rtol=bound, atol=4 * bound)
        torch.testing.assert_close(grad_weight.double(), expected_weight, rtol=1e-4, atol=1e-3)


def compare_decode(device: torch.device, rows: int, vocab: int, width: int, dtype: torch.dtype) -> None:
    hidden = torch.randn(rows, width, device=device).to(dtype)
    weight = (torch.randn(vocab, width, device=device) / width**0.5).to(dtype)
    best = top_classes(hidden, weight, 5)
    logits = hidden.double() @ weight.double().T
    bound = 1e-4 if uses_kernel(hidden, weight, 5) else 2 * torch.finfo(dtype).eps  # a GEMM rounds its logits
    torch.testing.assert_close(best.logits.double(), logits.topk(5).values, rtol=bound, atol=bound)
    torch.testing.assert_close(logits.gather(1, best.ids), best.logits.double(), rtol=bound, atol=bound)
    torch.testing.assert_close(best.lse.double(), logits.logsumexp(-1), rtol=bound / 10, atol=bound)


@check(small=True)
def decoding_of_few_rows(device: torch.device) -> None:
    for rows, dtype in ((1, torch.bfloat16), (9, torch.float16), (64, torch.bfloat16)):
        compare_decode(device, rows, 1003, 264, dtype)


def unaligned(x: Tensor) -> Tensor:
    """A copy of ``x`` that starts one element past a multiple of 16 bytes, as a view into a flat buffer may."""
    copy = x.new_empty(x.numel() + 1)[1:].view(x.shape).copy_(x)
    assert copy.data_ptr() % 16 == x.element_size()
    return copy


@check(small=True)
def tensors_that_are_not_aligned_give_the_same(device: torch.device) -> None:
    ops = backend_of(device).ops
    for dtype in DTYPES:
        x = torch.randn(37, 264, device=device).to(dtype)
        weight = torch.rand(3, 264, device=device) + 0.5
        grad_y, factor = torch.randn(3, 37, 264, device=device).to(dtype), torch.tensor([0.3], device=device)
        rstd = ops._rms_norm_heads(x, weight, 1e-5)[1]
        calls = [
            (ops._rms_norm_heads, (x, weight), (1e-5,)),
            (ops._rms_norm_heads_backward, (grad_y, x, weight, rstd), ()),
        ]
        if dtype != torch.float32:
            calls.append((ops._decode, (x, grad_y[0]), (5,)))
        for operator, tensors, rest in calls:
            aligned, shifted = operator(*tensors, *rest), operator(*map(unaligned, tensors), *rest)
            assert all(torch.equal(a, b) for a, b in zip(aligned, shifted, strict=True)), (operator, dtype)
        scaled, summed = (torch.empty_like(x) for _ in range(2)), torch.zeros(2, 264, device=device)
        for source, out, total in zip((x, unaligned(x)), scaled, summed, strict=True):
            ops._scale_into_(source, factor, unaligned(out))
            ops._scale_into_(source, factor, out)
            assert torch.equal(out, (x.float() * factor).to(dtype))
            ops._column_sum_(source, total, False)
        torch.testing.assert_close(summed[0], summed[1])


@check()
def decoding_with_a_large_vocabulary(device: torch.device) -> None:
    vocab = 128256 if device.type == "cuda" else 8192  # a CPU shows that the check is right, not the kernel
    for rows in (1, 8, 32, 64, 65):
        compare_decode(device, rows, vocab, 1024, torch.bfloat16)
