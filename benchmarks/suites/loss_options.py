"""The cost of each option of the fused loss relative to the plain loss, forward and backward, interleaved.

``python -m benchmarks.suites.loss_options --device cpu --out benchmarks/results/FILE.json``
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

import mtp_ext
from benchmarks.harness.runner import Case, main


def step(hidden: Tensor, weight: Tensor, targets: Tensor, options: dict[str, Any]) -> tuple[Tensor, ...]:
    loss = mtp_ext.linear_cross_entropy(hidden, weight, targets, **options)
    assert isinstance(loss, Tensor)
    return torch.autograd.grad(loss, (hidden, weight))


def options_of(n_rows: int, vocab_size: int, device: str) -> dict[str, dict[str, Any]]:
    class_weights = torch.rand(vocab_size, device=device) + 0.5
    return {
        "plain": {},
        "bias": {"bias": torch.randn(vocab_size, device=device, requires_grad=True)},
        "class_weights": {"class_weights": class_weights},
        "token_weights": {"token_weights": torch.rand(n_rows, device=device) + 0.5},
        "label_smoothing": {"label_smoothing": 0.1},
        "z_loss": {"z_loss": 1e-4},
        "logit_scale": {"logit_scale": 0.5},
        "softcap": {"softcap": 30.0},
        "all": {
            "bias": torch.randn(vocab_size, device=device, requires_grad=True),
            "class_weights": class_weights,
            "token_weights": torch.rand(n_rows, device=device) + 0.5,
            "label_smoothing": 0.1,
            "z_loss": 1e-4,
            "logit_scale": 0.5,
            "softcap": 30.0,
        },
    }


def cases(device: str, quick: bool) -> Iterator[Case]:
    n_rows, width, vocab_size = (64, 32, 1000) if quick else (4096, 512, 32000)
    hidden = torch.randn(n_rows, width, device=device, requires_grad=True)
    weight = (torch.randn(vocab_size, width, device=device) * 0.05).requires_grad_()
    targets = torch.randint(vocab_size, (n_rows,), device=device)
    shape: dict[str, int | str] = {"N": n_rows, "D": width, "V": vocab_size, "dtype": "float32"}
    for name, options in options_of(n_rows, vocab_size, device).items():
        fn = partial(step, hidden, weight, targets, options)
        yield Case("loss_options", name, shape, fn, flops=6 * n_rows * width * vocab_size)


if __name__ == "__main__":
    main(cases, baseline="plain", description=__doc__)
