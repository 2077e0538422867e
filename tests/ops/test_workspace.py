"""The chunk of logits outlives its call, once, and can be freed."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from mtp_ext import _C, linear_cross_entropy, release_workspace

ROWS = 50


@pytest.fixture(autouse=True)
def nothing_kept() -> Iterator[None]:
    release_workspace()
    yield
    release_workspace()


def loss(vocab: int, dtype: torch.dtype = torch.float32) -> float:
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(ROWS, 8, generator=g, dtype=dtype), torch.randn(vocab, 8, generator=g, dtype=dtype)
    return float(linear_cross_entropy(hidden, weight, torch.zeros(ROWS, dtype=torch.int64)))


def test_one_chunk_is_kept_and_used_again() -> None:
    values = [loss(300), loss(100), loss(100, torch.float64)]
    assert loss(300) == values[0] and loss(100) == values[1], "what the memory holds from before does not matter"
    assert loss(100, torch.float64) == values[2]
    assert _C.release_workspace() == ROWS * 300 * 4, "the largest chunk serves the others, whatever their dtype"
    assert _C.release_workspace() == 0 and loss(300) == values[0]
    release_workspace()
    assert _C.release_workspace() == 0


def test_memory_of_inference_mode_serves_other_calls() -> None:
    with torch.inference_mode():
        expected = loss(300)
    assert loss(300) == expected
    with torch.inference_mode():
        assert loss(300) == expected
    assert _C.release_workspace() == ROWS * 300 * 4


def test_threads_do_not_share() -> None:
    """They share the kept chunk in turn: whoever finds it taken has memory of its own."""
    vocabularies = [100, 300, 37, 1030]
    expected = [loss(vocab) for vocab in vocabularies]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(200):
            if loss(vocabularies[i]) != expected[i]:
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(vocabularies))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_large_chunk_is_not_kept() -> None:
    hidden, weight = torch.zeros(512, 1), torch.zeros(140_000, 1)
    linear_cross_entropy(hidden, weight, torch.zeros(512, dtype=torch.int64))  # 512 rows at the least: 273 MiB
    assert _C.release_workspace() == 0


def test_a_call_that_fails_leaves_the_chunk() -> None:
    loss(300)
    with pytest.raises(ValueError, match="targets must be"):
        linear_cross_entropy(torch.zeros(2, 8), torch.zeros(300, 8), torch.tensor([0, 300]))
    assert _C.release_workspace() == ROWS * 300 * 4
