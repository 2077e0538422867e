"""Memory-bound passes: the row kernel of the loss against a copy, and decoding against a read.

``copy`` moves as many bytes as the row kernel must (one read and one write of the logits); ``read`` sums the
unembedding, which decoding must read once. Short calls are timed as a replayed graph, cycling through several
unembeddings if one would stay in the L2 cache. ``python -m benchmarks.suites.row_pass --device cuda --out FILE.json``
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks.harness.case import Case, each
from benchmarks.harness.runner import main
from benchmarks.harness.timing import L2_FLUSH_BYTES
from mtp_ext.ops.common.result import RowTables
from mtp_ext.ops.loss.arguments import LossCall
from mtp_ext.ops.loss.options import RowOptions
from mtp_ext.ops.loss.row_kernels import RowScales, loss_rows_
from mtp_ext.ops.top_classes import top_classes

REPEATS = 20


def row_cases(n_rows: int, vocab: int, device: str) -> Iterator[Case]:
    """Yields cases of the row kernel, which overwrites its input: its time does not depend on the values."""
    padded = -(-vocab // 8) * 8  # rows start at multiples of 16 bytes
    logits = torch.randn(n_rows, padded, device=device, dtype=torch.bfloat16)[:, :vocab]
    other = torch.empty_like(logits)
    rows, labels = torch.arange(n_rows, device=device), torch.randint(vocab, (1, n_rows), device=device)
    tables = RowTables.zeros(1, 1, n_rows, dtype=torch.float32, device=torch.device(device))
    scales = RowScales(torch.ones(1, device=device), class_weight_sum=float(vocab))
    case = partial(
        Case,
        "row_pass",
        shape={"R": n_rows, "V": vocab, "dtype": "bfloat16"},
        bytes=4 * n_rows * vocab,
        repeats=REPEATS,
    )
    yield case("copy", fn=partial(other.copy_, logits))
    every = RowOptions(label_smoothing=0.1, softcap=30.0)
    for name, options in (("mtp_ext", RowOptions()), ("mtp_ext_all_options", every)):
        call = LossCall(labels, n_rows, 1, 0, torch.bfloat16, options)
        yield case(name, fn=partial(loss_rows_, logits, rows, call, scales, tables, write_gradient=True))


def in_turn(function: Callable[[Tensor], object], weights: Sequence[Tensor]) -> Callable[[], object]:
    """Returns a function that calls ``function`` with the next of ``weights`` each time."""
    following = itertools.cycle(weights)
    return lambda: function(next(following))


def decode_cases(n_rows: int, width: int, vocab: int, device: str) -> Iterator[Case]:
    hidden = torch.randn(n_rows, width, device=device, dtype=torch.bfloat16)
    weight = torch.randn(vocab, width, device=device, dtype=torch.bfloat16)
    copies = 1 if device == "cpu" else min(-(-L2_FLUSH_BYTES // weight.nbytes), REPEATS)
    weights = [weight, *(weight.clone() for _ in range(copies - 1))]
    case = partial(
        Case,
        "decode",
        shape={"R": n_rows, "D": width, "V": vocab, "dtype": "bfloat16"},
        bytes=weight.nbytes + hidden.nbytes,
        repeats=REPEATS,
    )
    yield case("read", fn=in_turn(torch.sum, weights))
    yield case("mtp_ext", fn=in_turn(lambda w: top_classes(hidden, w, 1), weights))
    yield case("gemm_max", fn=in_turn(lambda w: torch.mm(hidden, w.t()).max(-1), weights))


def cases(device: str, quick: bool) -> Iterator[Case]:
    if quick or device == "cpu":
        yield from row_cases(8, 1000, device)
        yield from decode_cases(2, 64, 1000, device)
        return
    yield from each(partial(row_cases, 4096, vocab, device) for vocab in (8192, 32000, 50304, 50257, 128256))
    sizes = itertools.product((4096, 1024), (128256, 32000), (1, 4, 16, 64))
    yield from each(partial(decode_cases, n_rows, width, vocab, device) for width, vocab, n_rows in sizes)


if __name__ == "__main__":
    main(cases, baseline=("copy", "read"), description=__doc__)
