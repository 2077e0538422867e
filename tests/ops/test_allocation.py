"""The chunk of logits outlives its call, once, and can be freed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from mtp_ext import linear_cross_entropy, release_workspace
from mtp_ext.ops.common import workspace as allocation

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def nothing_kept() -> Iterator[None]:
    release_workspace()
    yield
    release_workspace()


def loss(vocab: int, dtype: torch.dtype = torch.float32) -> float:
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(50, 8, generator=g, dtype=dtype), torch.randn(vocab, 8, generator=g, dtype=dtype)
    return float(linear_cross_entropy(hidden, weight, torch.zeros(50, dtype=torch.int64)))


def test_one_chunk_is_kept_and_used_again() -> None:
    values = [loss(300), loss(100), loss(100, torch.float64)]
    loss(300)
    (kept,) = allocation._kept
    address = kept.data_ptr()
    assert kept.numel() == 50 * 300
    assert loss(100) == values[1], "what the memory holds from before does not matter"
    assert [x.data_ptr() for x in allocation._kept] == [address]
    assert loss(100, torch.float64) == values[2]  # another dtype takes memory of its own
    assert [x.dtype for x in allocation._kept] == [torch.float64]
    release_workspace()
    assert allocation._kept == [] and loss(300) == values[0]


def test_memory_of_inference_mode_is_not_kept() -> None:
    with torch.inference_mode():
        expected = loss(300)
    assert allocation._kept == []
    assert loss(300) == expected
    with torch.inference_mode():
        assert loss(300) == expected, "ordinary memory serves both"


def test_two_calls_at_once_do_not_share() -> None:
    with allocation.workspace((4, 5), torch.float32, CPU):
        pass
    with allocation.workspace((4, 5), torch.float32, CPU) as a, allocation.workspace((4, 5), torch.float32, CPU) as b:
        assert a.shape == b.shape == (4, 5) and a.data_ptr() != b.data_ptr()
    assert len(allocation._kept) == 1


def test_what_is_large_or_failed_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocation, "KEPT_BYTES", 100)
    with allocation.workspace((100,), torch.float32, CPU):
        pass
    assert allocation._kept == []
    with pytest.raises(RuntimeError, match="inside"), allocation.workspace((2,), torch.float32, CPU):
        raise RuntimeError("inside")
    assert allocation._kept == []
