"""Errors of the fused loss and its gradients against float64, compared with eager torch in the same dtype.

``python -m benchmarks.studies.loss_errors --out benchmarks/results/loss_errors_cpu.json``

Each error is the maximum over a result, relative to the result's largest value. Inputs are rounded to the dtype first,
so that only arithmetic errors count.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mtp_ext
from benchmarks.harness.machine import describe
from benchmarks.harness.runner import write_atomically
from mtp_ext.ops import reference

N_ROWS, WIDTH = 256, 64
CASES: dict[str, dict[str, Any]] = {
    "V = 1000": {"vocab": 1000},
    "V = 128256": {"vocab": 128_256},
    "certain targets": {"vocab": 1000, "margin": 14.0},
    "softcap 30": {"vocab": 1000, "softcap": 30.0},
    "smoothing 0.1, z-loss 1e-3": {"vocab": 1000, "label_smoothing": 0.1, "z_loss": 1e-3},
}
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def inputs(vocab: int, margin: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Returns hidden, weight and targets; with a margin, each target's logit exceeds all others by about that."""
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(N_ROWS, WIDTH, generator=g)
    weight = torch.randn(vocab, WIDTH, generator=g) / WIDTH**0.5
    targets = torch.randint(vocab, (N_ROWS,), generator=g)
    if margin:
        hidden = weight[targets] / weight[targets].square().sum(1, keepdim=True) * margin
    return hidden.to(dtype), weight.to(dtype), targets


def results(
    function: Callable[..., Any], hidden: Tensor, weight: Tensor, targets: Tensor, options: dict[str, Any]
) -> dict[str, Tensor]:
    leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    loss = function(*leaves, targets, **options)
    grad_hidden, grad_weight = torch.autograd.grad(loss, leaves)
    return {"loss": loss.detach(), "grad_hidden": grad_hidden, "grad_weight": grad_weight}


def relative(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).abs().amax() / exact.abs().amax())


def rows() -> list[dict[str, Any]]:
    found = []
    for name, case in CASES.items():
        options = {k: v for k, v in case.items() if k not in ("vocab", "margin")}
        for dtype in DTYPES:
            x = inputs(case["vocab"], case.get("margin", 0.0), dtype)
            exact = results(reference.linear_cross_entropy, x[0].double(), x[1].double(), x[2], options)
            ours = results(mtp_ext.linear_cross_entropy, *x, options)
            eager = results(reference.linear_cross_entropy, *x, options)
            row: dict[str, Any] = {
                "benchmark": "loss_errors",
                "case": name,
                "dtype": str(dtype).removeprefix("torch."),
            }
            for key, value in exact.items():
                row |= {f"{key}_ours": relative(ours[key], value), f"{key}_eager": relative(eager[key], value)}
            found.append(row)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file")
    args = parser.parse_args()
    measured = rows()
    for row in measured:
        errors = "  ".join(f"{k} {v:.1e}" for k, v in row.items() if isinstance(v, float))
        print(f"{row['case']:28s} {row['dtype']:9s} {errors}")
    write_atomically(args.out, {"env": describe("cpu"), "rows": measured})


if __name__ == "__main__":
    main()
