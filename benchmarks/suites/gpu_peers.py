"""The fused loss on a GPU against other published losses and the bare GEMMs, in one process.

A peer that is not installed is listed with the reason in the file's ``absent``; one that fails has an ``error`` in its
row. ``loss_error`` is the relative difference of a peer's loss from ours.
``python -m benchmarks.suites.gpu_peers --device cuda --rounds 10 --out benchmarks/results/FILE.json``
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.harness.case import Case, each, short
from benchmarks.harness.runner import main
from benchmarks.suites.gpu_loss import floor_of
from benchmarks.suites.linear_cross_entropy import Loss, eager, fused, peers, step

# (N, D, V): the sizes for which the peers' authors publish results.
SHAPES = ((8192, 4096, 128256), (8192, 4096, 32000))


def liger() -> Loss:
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss()
    return lambda hidden, weight, targets: loss(weight, hidden, targets)


def quack() -> Loss:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return lambda hidden, weight, targets: chunked_linear_cross_entropy(hidden, weight, targets, chunk_size=4096)


def cut_cross_entropy() -> Loss:
    from cut_cross_entropy import linear_cross_entropy

    return lambda hidden, weight, targets: linear_cross_entropy(hidden, weight, targets)


PUBLISHED: dict[str, Callable[[], Loss]] = {"liger": liger, "quack": quack, "cut_cross_entropy": cut_cross_entropy}


def published() -> tuple[dict[str, Loss], dict[str, str]]:
    """Returns the installed peers, and why the others are missing."""
    found: dict[str, Loss] = {}
    absent: dict[str, str] = {}
    for name, load in PUBLISHED.items():
        try:
            found[name] = load()
        except Exception as error:  # importing may also fail for lack of dependencies
            absent[name] = short(error)
    return found, absent


def absent_peers() -> dict[str, dict[str, str]]:
    absent = published()[1]
    if "torch_linear_ce" not in peers():
        absent["torch_linear_ce"] = f"torch {torch.__version__} has no LinearCrossEntropyOptions"
    return {"absent": absent}


def loss_error(loss: Loss, hidden: Tensor, weight: Tensor, targets: Tensor) -> dict[str, float]:
    with torch.no_grad():
        ours = fused(hidden, weight, targets).double()
    found = loss(hidden, weight, targets).detach().double()
    return {"loss_error": float((found - ours).abs() / ours)}


def cases_of(n_rows: int, width: int, vocab: int, device: str) -> Iterator[Case]:
    generator = torch.Generator(device).manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    hidden = torch.randn(n_rows, width, generator=generator, device=device).to(dtype).requires_grad_()
    weight = torch.randn(vocab, width, generator=generator, device=device).mul_(0.05).to(dtype).requires_grad_()
    targets = torch.randint(vocab, (n_rows,), generator=generator, device=device)
    case = partial(
        Case,
        "gpu_peers",
        shape={"N": n_rows, "D": width, "V": vocab, "dtype": str(dtype).removeprefix("torch.")},
        flops=6 * n_rows * width * vocab,
    )
    yield case("gemms", fn=floor_of(hidden.detach(), weight.detach()))
    yield case("mtp_ext", fn=partial(step, fused, hidden, weight, targets))
    others = {**peers(), **published()[0]}
    if device == "cuda":
        others["eager_compiled"] = torch.compile(eager)
    for name, loss in others.items():
        arguments = (loss, hidden, weight, targets)
        yield case(name, fn=partial(step, *arguments), facts=partial(loss_error, *arguments))


def cases(device: str, quick: bool) -> Iterator[Case]:
    shapes = ((64, 32, 1000),) if quick or device == "cpu" else SHAPES
    yield from each(partial(cases_of, *shape, device) for shape in shapes)


if __name__ == "__main__":
    main(cases, baseline="gemms", description=__doc__, facts=absent_peers)
