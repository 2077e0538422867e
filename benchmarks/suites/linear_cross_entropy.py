"""The fused loss, forward and backward, against its three GEMMs alone and against its peers.

``gemms`` only multiplies the same operands in chunks, a lower bound for any method with exact gradients.
``python -m benchmarks.suites.linear_cross_entropy --device cpu --out benchmarks/results/FILE.json``

On CPUs without a native bfloat16 GEMM (torch needs minutes per call at full size), the bfloat16 floor is the float32
GEMMs, ``gemms_float32``, and the peers are measured at fewer rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import mtp_ext
from benchmarks.harness.runner import Case, main
from mtp_ext.ops.common.backend import has_fast_bfloat16_gemm

CHUNK_ROWS = 1024
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def bare_gemms(hidden: Tensor, weight: Tensor, logits: Tensor, grad_hidden: Tensor, grad_weight: Tensor) -> None:
    """Computes ``Z = H W^T``, ``dH = Z W``, ``dW += Z^T H`` in chunks of rows, into preallocated memory."""
    for row in range(0, len(hidden), CHUNK_ROWS):
        h = hidden[row : row + CHUNK_ROWS]
        z = torch.mm(h, weight.t(), out=logits[: len(h)])
        torch.mm(z, weight, out=grad_hidden[row : row + CHUNK_ROWS])
        torch.addmm(grad_weight, z.t(), h, beta=float(row > 0), out=grad_weight)


def gemms_case(hidden: Tensor, weight: Tensor) -> Callable[[], None]:
    logits = hidden.new_empty(min(CHUNK_ROWS, len(hidden)), len(weight))
    return partial(bare_gemms, hidden, weight, logits, torch.empty_like(hidden), torch.empty_like(weight))


def eager(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight), targets)


def torch_chunked(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(hidden, weight, targets, options=options)


def fused(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    loss = mtp_ext.linear_cross_entropy(hidden, weight, targets)
    assert isinstance(loss, Tensor)
    return loss


def peers() -> dict[str, Loss]:
    found: dict[str, Loss] = {"eager": eager}
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):  # torch >= 2.13
        found["torch_linear_ce"] = torch_chunked
    return found


def step(loss: Loss, hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss(hidden, weight, targets), (hidden, weight))


def shapes(device: str, quick: bool) -> Iterator[tuple[int, int, int, torch.dtype, bool]]:
    """Yields ``(N, D, V, dtype, with peers)``."""
    if quick:
        yield from [(64, 32, 1000, torch.float32, True), (64, 32, 1000, torch.bfloat16, True)]
        return
    slow = device == "cpu" and not has_fast_bfloat16_gemm()
    yield 4096, 512, 32000, torch.float32, True
    yield 4096, 512, 32000, torch.bfloat16, not slow
    if slow:
        yield 128, 512, 32000, torch.bfloat16, True


def cases(device: str, quick: bool) -> Iterator[Case]:
    for n_rows, width, vocab_size, dtype, with_peers in shapes(device, quick):
        generator = torch.Generator(device).manual_seed(0)
        hidden = torch.randn(n_rows, width, generator=generator, device=device)
        weight = torch.randn(vocab_size, width, generator=generator, device=device) * 0.05
        targets = torch.randint(vocab_size, (n_rows,), generator=generator, device=device)
        name = str(dtype).removeprefix("torch.")
        case = partial(
            Case,
            "linear_cross_entropy",
            shape={"N": n_rows, "D": width, "V": vocab_size, "dtype": name},
            flops=6 * n_rows * width * vocab_size,
        )
        if dtype != torch.float32:
            yield case("gemms_float32", fn=gemms_case(hidden, weight))
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        leaves = (hidden.clone().requires_grad_(), weight.clone().requires_grad_(), targets)
        yield case("mtp_ext", fn=partial(step, fused, *leaves))
        if with_peers:
            yield case("gemms", fn=gemms_case(hidden, weight))
            for impl, loss in peers().items():
                yield case(impl, fn=partial(step, loss, *leaves))


if __name__ == "__main__":
    main(cases, baseline="gemms", description=__doc__)
