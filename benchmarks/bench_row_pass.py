"""The passes that memory bounds: the row kernel of the loss, and decoding, against the device's own copy and read.

``copy`` moves as many bytes as the row kernel has to (one read and one write of the logits); ``read`` sums the
unembedding, which decoding has to read once. ``python -m benchmarks.bench_row_pass --device cuda --out FILE.json``
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.harness import Case, main
from mtp_ext.ops.decode import top_classes
from mtp_ext.ops.row_kernels import RowOptions, RowTables, RowTargets, loss_rows_


def row_pass(
    logits: Tensor, rows: Tensor, targets: RowTargets, tables: RowTables, scale: Tensor, options: RowOptions
) -> None:
    """Works in place, on its own result from the second call on: the time does not depend on the values."""
    loss_rows_(
        logits,
        rows,
        targets,
        tables,
        head_scale=scale,
        options=options,
        class_weight_sum=float(logits.shape[1]),
        write_gradient=True,
    )


def row_cases(n_rows: int, vocab: int, device: str) -> Iterator[Case]:
    logits = torch.randn(n_rows, vocab, device=device, dtype=torch.bfloat16)
    other = torch.empty_like(logits)
    rows = torch.arange(n_rows, device=device)
    targets = RowTargets(torch.randint(vocab, (1, n_rows), device=device), None, None, n_rows, 0)
    tables = RowTables.zeros(n_rows, torch.float32, torch.device(device))
    scale = torch.ones(1, device=device)
    case = partial(Case, "row_pass", shape={"R": n_rows, "V": vocab}, bytes=2 * logits.nbytes)
    yield case("copy", fn=partial(other.copy_, logits))
    yield case("mtp_ext", fn=partial(row_pass, logits, rows, targets, tables, scale, RowOptions()))
    general = RowOptions(label_smoothing=0.1, softcap=30.0)
    yield case("mtp_ext_all_options", fn=partial(row_pass, logits, rows, targets, tables, scale, general))


def decode_cases(n_rows: int, width: int, vocab: int, device: str) -> Iterator[Case]:
    hidden = torch.randn(n_rows, width, device=device, dtype=torch.bfloat16)
    weight = torch.randn(vocab, width, device=device, dtype=torch.bfloat16)
    case = partial(Case, "decode", shape={"R": n_rows, "D": width, "V": vocab}, bytes=weight.nbytes)
    yield case("read", fn=partial(torch.sum, weight))
    yield case("mtp_ext", fn=partial(top_classes, hidden, weight, 1))
    yield case("gemm_argmax", fn=lambda: torch.mm(hidden, weight.t()).argmax(-1))


def cases(device: str, quick: bool) -> Iterator[Case]:
    if quick or device == "cpu":
        yield from row_cases(8, 1000, device)
        yield from decode_cases(2, 64, 1000, device)
        return
    for vocab in (32000, 50257, 128256):
        yield from row_cases(4096, vocab, device)
    for n_rows in (1, 4, 16, 64):
        yield from decode_cases(n_rows, 4096, 128256, device)


if __name__ == "__main__":
    main(cases, description=__doc__)
