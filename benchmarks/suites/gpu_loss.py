"""The fused loss at training sizes against the three bare GEMMs, over widths, vocabularies, chunks and heads.

16384 rows in total, in bfloat16, and fewer at the end; ``gemms`` is only the GEMMs, with the weight's gradient
accumulated in float32 as in the loss, of values as the loss has them: clocks depend on the bits. Last, a batch with a
target in every other row, with and without ``max_valid``.
``python -m benchmarks.suites.gpu_loss --device cuda --rounds 10 --out benchmarks/results/FILE.json``
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

import mtp_ext
from benchmarks.harness.case import Case, each
from benchmarks.harness.runner import main

N_ROWS = 16384
CHUNKS = (2048, 4096, 8192)
FLOOR_CHUNK = 4096
# Sizes with a target ratio come first, so that an interrupted run has them.
SHAPES = ((4096, 128256), (4096, 32000), (1024, 32000), (8192, 128256), (1024, 128256), (8192, 32000))
FEW_ROWS = (512, 1024, 2048, 4096)
EVERY_OPTION: dict[str, Any] = {"label_smoothing": 0.1, "z_loss": 1e-4, "softcap": 30.0}


def add_product(grad_weight: Tensor, z: Tensor, h: Tensor, beta: float) -> None:
    if z.dtype == grad_weight.dtype:
        torch.addmm(grad_weight, z.t(), h, beta=beta, out=grad_weight)
    else:
        torch.addmm(grad_weight, z.t(), h, out_dtype=grad_weight.dtype, beta=beta, out=grad_weight)


def bare_gemms(
    hidden: Tensor, weight: Tensor, logits: Tensor, grad_logits: Tensor, grad_hidden: Tensor, grad_weight: Tensor
) -> None:
    """Computes ``Z = H W^T``, ``dH = dZ W``, ``dW += dZ^T H`` in chunks of the rows of ``logits``, given ``dZ``."""
    for row in range(0, len(hidden), len(logits)):
        h = hidden[row : row + len(logits)]
        torch.mm(h, weight.t(), out=logits[: len(h)])
        torch.mm(grad_logits[: len(h)], weight, out=grad_hidden[row : row + len(h)])
        add_product(grad_weight, grad_logits[: len(h)], h, float(row > 0))


def floor_of(hidden: Tensor, weight: Tensor) -> Callable[[], None]:
    """Returns the GEMMs of a loss of ``hidden [N, D]``, with the gradient of a mean over ``N`` for ``dZ``."""
    logits = torch.mm(hidden[:FLOOR_CHUNK], weight.t())
    grad = logits.float().softmax(-1)
    grad[:, 0] -= 1
    grad_logits = grad.div_(len(hidden)).to(logits.dtype)
    grad_weight = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
    return partial(bare_gemms, hidden, weight, logits, grad_logits, torch.empty_like(hidden), grad_weight)


def fused(
    options: dict[str, Any], chunk: int | None, hidden: Tensor, weight: Tensor, labels: Tensor
) -> tuple[Tensor, ...]:
    loss = mtp_ext.multi_token_cross_entropy(hidden, weight, labels, chunk_rows=chunk, **options).loss
    return torch.autograd.grad(loss, (hidden, weight))


def cases_of(n_rows: int, heads: int, width: int, vocab: int, device: str, chunks: tuple[int, ...]) -> Iterator[Case]:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    generator = torch.Generator(device).manual_seed(0)
    seq = n_rows // heads
    hidden = torch.randn(heads, 1, seq, width, generator=generator, device=device, dtype=dtype).requires_grad_()
    weight = torch.randn(vocab, width, generator=generator, device=device, dtype=dtype).mul_(0.05).requires_grad_()
    labels = torch.randint(vocab, (1, seq + heads), generator=generator, device=device)
    case = partial(
        Case,
        "gpu_loss",
        shape={"N": n_rows, "n": heads, "D": width, "V": vocab},
        flops=6 * n_rows * width * vocab,
    )
    yield case("gemms", fn=floor_of(hidden.detach().view(n_rows, width), weight.detach()))
    yield case("mtp_ext", fn=partial(fused, {}, None, hidden, weight, labels))
    yield case("mtp_ext_all_options", fn=partial(fused, EVERY_OPTION, None, hidden, weight, labels))
    for chunk in chunks:
        yield case(f"mtp_ext_chunk_{chunk}", fn=partial(fused, {}, chunk, hidden, weight, labels))


def half_ignored(max_valid: int | None, hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    loss = mtp_ext.linear_cross_entropy(hidden, weight, targets, max_valid=max_valid)
    assert isinstance(loss, Tensor)
    return torch.autograd.grad(loss, (hidden, weight))


def bound_cases(n_rows: int, width: int, vocab: int, device: str) -> Iterator[Case]:
    """Yields cases that ignore every other row, with and without ``max_valid``."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    generator = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(n_rows, width, generator=generator, device=device, dtype=dtype).requires_grad_()
    weight = torch.randn(vocab, width, generator=generator, device=device, dtype=dtype).mul_(0.05).requires_grad_()
    targets = torch.randint(vocab, (n_rows,), generator=generator, device=device)
    targets[::2] = -100
    for impl, max_valid in (("every_row", None), ("max_valid", n_rows // 2)):
        fn = partial(half_ignored, max_valid, hidden, weight, targets)
        yield Case("gpu_half_ignored", impl, {"N": n_rows, "D": width, "V": vocab}, fn)


def cases(device: str, quick: bool) -> Iterator[Case]:
    if quick or device == "cpu":
        for heads in (1, 4):
            yield from cases_of(64, heads, 32, 1000, device, (16, 32))
        yield from bound_cases(64, 32, 1000, device)
        return
    sizes = itertools.product(SHAPES, (1, 4))
    yield from each(partial(cases_of, N_ROWS, heads, *shape, device, CHUNKS) for shape, heads in sizes)
    yield from each(partial(cases_of, n_rows, 1, 1024, 32000, device, ()) for n_rows in FEW_ROWS)
    yield from each([partial(bound_cases, N_ROWS, 4096, 32000, device)])


if __name__ == "__main__":
    main(cases, baseline=("gemms", "every_row"), description=__doc__)
