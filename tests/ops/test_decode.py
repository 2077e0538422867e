"""The best classes of a few rows; the kernel itself is tested under the emulator and in tests/gpu."""

from __future__ import annotations

import pytest
import torch

from mtp_ext.ops.decode import top_classes


def test_top_classes_are_those_of_the_logits() -> None:
    hidden, weight = torch.randn(5, 16, dtype=torch.float64), torch.randn(40, 16, dtype=torch.float64)
    best = top_classes(hidden, weight, 4)
    logits = hidden @ weight.T
    assert torch.equal(best.ids, logits.topk(4).indices)
    torch.testing.assert_close(best.logits, logits.topk(4).values.float())
    torch.testing.assert_close(best.lse, logits.logsumexp(-1).float())


def test_of_equal_logits_the_lowest_class_comes_first() -> None:
    weight = torch.zeros(9, 8)
    weight[[7, 2, 5]] = 1.0
    assert top_classes(torch.ones(1, 8), weight, 4).ids.tolist() == [[2, 5, 7, 0]]


def test_more_classes_than_there_are() -> None:
    with pytest.raises(ValueError, match="k must be at most V = 3, got 4"):
        top_classes(torch.ones(1, 8), torch.ones(3, 8), 4)
