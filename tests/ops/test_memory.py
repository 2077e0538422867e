"""The logits are never whole, and the memory of a call grows with neither rows nor heads."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

from mtp_ext import _C, linear_cross_entropy, multi_token_cross_entropy
from mtp_ext.ops.common.backend import has_fast_bfloat16_gemm
from mtp_ext.ops.reference import multi_token_cross_entropy as eager
from tests.support import forked
from tests.support.largest_tensor import LargestTensor

D, V = 16, 2000


@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, {"softcap": 5.0, "label_smoothing": 0.1}], ids=str)
def test_logits_are_never_whole(options: dict[str, Any]) -> None:
    hidden = torch.randn(4, 2, 300, D, requires_grad=True)
    weight = torch.randn(V, D, requires_grad=True)
    labels = torch.randint(V, (2, 304))
    _C.release_workspace()
    with LargestTensor() as seen:
        multi_token_cross_entropy(hidden, weight, labels, chunk_rows=64, **options).loss.sum().backward()
    assert seen.numel <= 64 * V and _C.release_workspace() == 64 * V * 4
    with LargestTensor() as seen:
        linear_cross_entropy(
            hidden, weight, labels[:, :300].expand(4, 2, 300), chunk_rows=32, **options
        ).sum().backward()
    assert seen.numel <= max(32 * V, hidden.numel()) and _C.release_workspace() == 32 * V * 4
    with LargestTensor() as seen:
        eager(hidden, weight, labels).loss.backward()
    assert seen.numel >= 2 * 300 * V, "the detector is blind"


def test_workspace_bytes_bounds_a_chunk() -> None:
    hidden, weight = torch.randn(500, D, requires_grad=True), torch.randn(V, D)
    _C.release_workspace()
    with LargestTensor() as seen:
        linear_cross_entropy(hidden, weight, torch.randint(V, (500,)), workspace_bytes=100 * V * 4).backward()
    assert seen.numel <= 100 * V and _C.release_workspace() == 100 * V * 4


def extra_bytes(n: int, positions: int) -> int:
    """Resident bytes that one forward and backward adds, beyond the gradients; for a fresh process."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    vocab, width = 32000, 32
    hidden = torch.randn(n, 1, positions, width, requires_grad=True)
    weight = torch.randn(vocab, width, requires_grad=True)
    labels = torch.randint(vocab, (1, positions + n))
    small = multi_token_cross_entropy(hidden[:1, :, :8], weight, labels[:, :9], chunk_rows=8)
    small.loss.backward()  # loads code
    before = forked.peak_bytes()
    multi_token_cross_entropy(hidden, weight, labels, chunk_rows=512).loss.backward()
    return forked.peak_bytes() - before - 4 * (hidden.numel() + weight.numel())


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the resident memory from /proc")
def test_extra_memory_is_the_chunk_and_flat() -> None:
    chunk = 512 * 32000 * 4
    for n, positions in ((1, 1024), (8, 1024), (1, 8192)):
        assert forked.call(extra_bytes, n, positions) <= 1.2 * chunk, (n, positions)


def bytes_of_row_counts(counts: int) -> int:
    """Resident bytes that calls with ``counts`` different numbers of targets add to the first; for a fresh process."""
    torch.set_num_threads(1)
    hidden = torch.randn(800, 256, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(4096, 256, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(4096, (800,))

    def step() -> None:
        torch.autograd.grad(linear_cross_entropy(hidden, weight, targets), (hidden, weight))

    targets[0] = -100  # from here on, rows are gathered
    step()
    before = forked.peak_bytes()
    for ignored in range(1, counts):
        targets[ignored] = -100
        step()
    return forked.peak_bytes() - before


@pytest.mark.slow
@pytest.mark.skipif(not has_fast_bfloat16_gemm(), reason="only bfloat16 GEMMs are compiled for each shape")
def test_each_number_of_targets_compiles_no_gemms() -> None:
    grown = forked.call(bytes_of_row_counts, 60)  # 112 MiB where each number is a shape of its own
    assert grown < 64 << 20, f"{grown >> 20} MiB"
