"""The rows of a chunk on a GPU: the cost model's bounds, whole tiles, balanced chunks."""

from __future__ import annotations

import pytest

from mtp_ext.ops.loss.chunk_size import chunk_size


def size(n_rows: int, vocab: int, width: int) -> int:
    return chunk_size(n_rows, vocab, 2, chunk_rows=None, workspace_bytes=None, gpu_width=width)


@pytest.mark.parametrize(
    ("n_rows", "vocab", "width", "expected"),
    [
        (16384, 32000, 1024, 8192),  # 512 MiB hold 8388 rows
        (16384, 50304, 1024, 4096),  # 5336 rows
        (16384, 128256, 4096, 4096),  # 1 GiB holds 4186 rows
        (16384, 256000, 1024, 2048),  # 512 MiB would hold 1048: never fewer than 2048
        (16384, 1000, 512, 8192),  # never more than 8192
        (9000, 32000, 1024, 4608),  # two chunks, balanced, in whole tiles
        (100, 32000, 1024, 100),
        (0, 32000, 1024, 1),
    ],
)
def test_gpu_chunks(n_rows: int, vocab: int, width: int, expected: int) -> None:
    assert size(n_rows, vocab, width) == expected


def test_the_callers_limits_come_first() -> None:
    limits = {"gpu_width": 1024}
    assert chunk_size(100, 32000, 2, chunk_rows=7, workspace_bytes=None, **limits) == 7
    assert chunk_size(100, 1000, 2, chunk_rows=None, workspace_bytes=20_000, **limits) == 10


@pytest.mark.parametrize(("itemsize", "expected"), [(4, 1024), (2, 2048), (8, 512)])
def test_cpu_chunks_hold_128_mib(itemsize: int, expected: int) -> None:
    assert chunk_size(2**14, 32768, itemsize, chunk_rows=None, workspace_bytes=None) == expected


@pytest.mark.parametrize(
    ("n_rows", "gpu_width", "expected"),
    [
        (2048 + 512, None, 2560),  # 512 more rows of logits take no more than the float32 sum at D = 512
        (2048 + 513, None, 1281),
        (8192 + 512, 512, 8704),
        (8192 + 513, 512, 4480),  # two chunks, in whole tiles
    ],
)
def test_one_chunk_instead_of_a_float32_sum(n_rows: int, gpu_width: int | None, expected: int) -> None:
    limits = {"chunk_rows": None, "workspace_bytes": None, "gpu_width": gpu_width}
    assert chunk_size(n_rows, 32000, 2, sum_width=512, **limits) == expected
    assert chunk_size(n_rows, 32000, 2, **limits) < n_rows
