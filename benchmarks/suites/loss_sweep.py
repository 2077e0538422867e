"""The fused loss against eager torch over a grid of sizes, and its growth with N, V and n.

``python -m benchmarks.suites.loss_sweep --device cpu --seconds 2 --rounds 300 --out benchmarks/results/FILE.json``:
calls of a millisecond need 300 rounds to resolve 2 %; longer calls take as many rounds as fit in the seconds.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial

import psutil
import torch
from torch import Tensor

import mtp_ext
from benchmarks.harness.runner import Case, main
from benchmarks.suites.linear_cross_entropy import eager, fused, step

ROWS, WIDTHS, VOCABULARIES = (256, 1024, 4096, 16384), (256, 512, 1024), (256, 8192, 32000, 128256)


def eager_fits(n_rows: int, vocab_size: int, device: str) -> bool:
    """Returns True if three tensors of logits (log-softmax and two gradients) fit in memory."""
    free = psutil.virtual_memory().available if device == "cpu" else torch.cuda.mem_get_info()[0]
    return 3 * 4 * n_rows * vocab_size < 0.8 * free


def sweep(device: str, quick: bool) -> Iterator[Case]:
    grid = itertools.product(*((64, 128), (32,), (100, 500)) if quick else (ROWS, WIDTHS, VOCABULARIES))
    for n_rows, width, vocab_size in grid:
        hidden = torch.randn(n_rows, width, device=device, requires_grad=True)
        weight = (torch.randn(vocab_size, width, device=device) * 0.05).requires_grad_()
        targets = torch.randint(vocab_size, (n_rows,), device=device)
        shape = {"N": n_rows, "D": width, "V": vocab_size, "dtype": "float32"}
        flops = 6 * n_rows * width * vocab_size
        for impl, loss in (("mtp_ext", fused), ("eager", eager)):
            if impl == "mtp_ext" or eager_fits(n_rows, vocab_size, device):
                fn = partial(step, loss, hidden, weight, targets)
                yield Case("loss_sweep", impl, shape, fn, flops=flops, measure_peak=False)


def heads_step(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(mtp_ext.multi_token_cross_entropy(hidden, weight, labels).loss, (hidden, weight))


def growth(device: str, quick: bool) -> Iterator[Case]:
    """Yields cases that double one size at a time, from n = 1, N = 1024 positions, V = 8192."""
    width, start = (16, (1, 64, 128)) if quick else (256, (1, 1024, 8192))
    for axis, name in enumerate(("n", "N", "V")):
        for factor in (1, 2, 4, 8):
            n, positions, vocab_size = (size * (factor if i == axis else 1) for i, size in enumerate(start))
            hidden = torch.randn(n, 1, positions, width, device=device, requires_grad=True)
            weight = torch.randn(vocab_size, width, device=device, requires_grad=True)
            labels = torch.randint(vocab_size, (1, positions + n), device=device)
            shape: dict[str, int | str] = {"grows": name, "n": n, "N": positions, "D": width, "V": vocab_size}
            fn = partial(heads_step, hidden, weight, labels)
            yield Case("loss_growth", "mtp_ext", shape, fn, flops=6 * n * positions * width * vocab_size)


def cases(device: str, quick: bool) -> Iterator[Case]:
    yield from growth(device, quick)
    yield from sweep(device, quick)


if __name__ == "__main__":
    main(cases, baseline="eager", description=__doc__)
