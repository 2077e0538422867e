"""Document ids of packed rows, from boundaries."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import mtp_ext
from tests.support.pretend_cuda import pretend_cuda


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_ids_change_at_the_boundaries(dtype: torch.dtype) -> None:
    for bounds, length, expected in (
        ([0, 3, 3, 5], 7, [0, 0, 0, 2, 2, 3, 3]),  # an empty document, and tokens behind the last
        ([0, 4], 4, [0, 0, 0, 0]),
        ([0], 2, [0, 0]),
        ([0, 0], 0, []),
    ):
        ids = mtp_ext.document_ids(torch.tensor(bounds, dtype=dtype), length)
        assert ids.dtype == torch.int64 and ids.shape == (1, length) and ids[0].tolist() == expected


def test_targets_stay_within_documents() -> None:
    """As the loss and the counts take them."""
    labels = torch.arange(1, 9)[None]
    ids = mtp_ext.document_ids(torch.tensor([0, 3, 8]), 8)
    assert mtp_ext.count_targets(labels, 2, seq_len=8, document_ids=ids) == [2 + 4, 1 + 3]


def test_a_gpu_is_not_waited_for() -> None:
    bounds = torch.tensor([0, 2, 5])
    with pretend_cuda():
        ids = mtp_ext.document_ids(bounds, 6)
    assert ids[0].tolist() == [0, 0, 1, 1, 1, 2]


@pytest.mark.parametrize(
    ("bounds", "length", "error", "message"),
    [
        (torch.tensor([0.0, 1.0]), 3, TypeError, "cu_seqlens"),
        ([0, 1], 3, TypeError, "cu_seqlens"),
        (torch.tensor([[0, 1]]), 3, ValueError, r"\[n \+ 1\]"),
        (torch.tensor([1, 2]), 3, ValueError, "ascend from 0"),
        (torch.tensor([0, 2, 1]), 3, ValueError, "ascend from 0"),
        (torch.tensor([0, 4]), 3, ValueError, "at most length=3"),
        (torch.tensor([0, 1]), -1, ValueError, "length"),
        (torch.tensor([0, 1]), 1.5, TypeError, "length"),
    ],
)
def test_wrong_arguments(bounds: Any, length: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        mtp_ext.document_ids(bounds, length)
