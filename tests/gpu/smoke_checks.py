"""The first seconds on a GPU: two shapes of the loss, and the names of the kernels that ran."""

from __future__ import annotations

import torch
from torch.profiler import ProfilerActivity, profile

import mtp_ext
from tests.gpu.registry import check
from tests.support.accuracy import assert_accurate
from tests.support.loss_calls import Call

SHAPES = ((96, 64, 1003), (256, 512, 32000))


@check(small=True, part="smoke")
def two_shapes_equal_float64(device: torch.device) -> None:
    for n, width, vocab in SHAPES:
        g = torch.Generator().manual_seed(vocab)
        tensors = {
            "hidden": torch.randn(n, width, generator=g).double(),
            "weight": (torch.randn(vocab, width, generator=g) * 0.05).double(),
            "labels": torch.randint(vocab, (n,), generator=g),
        }
        assert_accurate(Call(torch.bfloat16, tensors, {}, heads=False), device=device)


@check(part="smoke")
def the_kernels_have_names(device: torch.device) -> None:
    """Prints the kernels of one call, and finds the loss's own among them."""
    hidden = torch.randn(256, 512, device=device, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(32000, 512, device=device, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(32000, (256,), device=device)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        torch.autograd.grad(mtp_ext.linear_cross_entropy(hidden, weight, targets), (hidden, weight))
        torch.cuda.synchronize()
    names = {event.name for event in seen.events() if event.device_type.name == "CUDA"}
    print("\n".join(sorted(names)), flush=True)
    assert any("loss_rows" in name for name in names), names
