"""Batching heads on one trunk: linear heads as one GEMM, and norm-only heads in one kernel.

``n`` linear heads are ``n`` GEMMs ``[N, D] x [D, D]``, or one with their stacked parameters, ``[N, D] x [D, n D]``.
Stacking costs a copy of the parameters and, in backward, one of the outputs' gradients. ``n`` norms are ``n`` calls of
torch's or our norm, or one call that reads the trunk once. Forward and backward together, as a replayed graph.
``python -m benchmarks.suites.gpu_heads --device cuda --rounds 10 --out benchmarks/results/FILE.json``
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness.case import Case, each
from benchmarks.harness.runner import main
from mtp_ext.ops.rms_norm import rms_norm, rms_norm_heads

N_ROWS, N_HEADS, WIDTHS, EPS = 4096, 4, (4096, 1024), 1e-5
REPEATS = 10
Forward = Callable[[Tensor, Sequence[Tensor]], Sequence[Tensor]]


def separate(hidden: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    return [F.linear(hidden, weight) for weight in weights]


def stacked(hidden: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Runs one stacked GEMM; each head's output is a view of columns, as the next operator would get it."""
    return F.linear(hidden, torch.cat(list(weights))).chunk(len(weights), dim=-1)


def torch_norms(hidden: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    return [F.rms_norm(hidden, weight.shape, weight, EPS) for weight in weights]


def our_norms(hidden: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    return [rms_norm(hidden, weight, EPS) for weight in weights]


def norms_together(hidden: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
    outputs = rms_norm_heads(hidden, torch.stack(list(weights)), EPS)
    assert isinstance(outputs, Tensor)
    return outputs.unbind(0)


def step(forward: Forward, hidden: Tensor, weights: Sequence[Tensor], grads: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(forward(hidden, weights), [hidden, *weights], grads)


def cases_of(kind: str, n_rows: int, width: int, device: str) -> Iterator[Case]:
    generator = torch.Generator(device).manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    normal = partial(torch.randn, generator=generator, device=device, dtype=dtype)
    linear = kind == "linear_heads"
    hidden = normal(n_rows, width).requires_grad_()
    weights = [normal(*[width] * (2 if linear else 1)).mul_(width**-0.5).requires_grad_() for _ in range(N_HEADS)]
    grads = [normal(n_rows, width) for _ in range(N_HEADS)]
    case = partial(
        Case,
        kind,
        shape={"N": n_rows, "n": N_HEADS, "D": width, "dtype": str(dtype).removeprefix("torch.")},
        flops=6 * n_rows * N_HEADS * width * width if linear else 0,
        # Forward: the trunk and n outputs. Backward: n gradients, the trunk and its gradient.
        bytes=0 if linear else (2 * N_HEADS + 3) * hidden.nbytes,
        repeats=REPEATS,
    )
    linears: dict[str, Forward] = {"separate": separate, "stacked": stacked}
    norms: dict[str, Forward] = {"torch": torch_norms, "mtp_ext_separate": our_norms, "mtp_ext": norms_together}
    for impl, forward in (linears if linear else norms).items():
        yield case(impl, fn=partial(step, forward, hidden, weights, grads))


def cases(device: str, quick: bool) -> Iterator[Case]:
    sizes = [(64, 32)] if quick or device == "cpu" else [(N_ROWS, width) for width in WIDTHS]
    kinds = ("linear_heads", "norm_heads")
    yield from each(partial(cases_of, kind, *size, device) for kind in kinds for size in sizes)


if __name__ == "__main__":
    main(cases, baseline=("separate", "torch"), description=__doc__)
