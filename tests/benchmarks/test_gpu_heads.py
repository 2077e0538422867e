"""What benchmarks/suites/gpu_heads.py compares is one computation in several forms."""

from __future__ import annotations

import pytest
import torch

from benchmarks.suites import gpu_heads
from tests.support.norm_operators import norms_by_operators


@pytest.mark.parametrize(("kind", "n_impls"), [("linear_heads", 2), ("norm_heads", 3)])
def test_every_implementation_gives_the_same_gradients(kind: str, n_impls: int) -> None:
    cases = list(gpu_heads.cases_of(kind, 8, 16, "cpu"))
    assert len({case.impl for case in cases}) == len(cases) == n_impls and len({case.group for case in cases}) == 1
    with norms_by_operators():  # as on a GPU
        first, *others = [case.fn() for case in cases]
    assert isinstance(first, tuple) and [x.shape for x in first[:2]] == [(8, 16), (16, 16)[-first[1].dim() :]]
    for other in others:
        torch.testing.assert_close(other, first)
