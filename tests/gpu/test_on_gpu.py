"""The checks of tests/gpu under pytest; ``python -m tests.gpu.run`` runs them where there is no pytest."""

from __future__ import annotations

import pytest
import torch

from tests.gpu.registry import CannotRun, Check, all_checks


def test_no_check_is_lost() -> None:
    names = [check.name for check in all_checks()]
    assert len(names) == len(set(names)) > 15 and any(check.small for check in all_checks())


@pytest.mark.gpu
@pytest.mark.parametrize("check", all_checks(), ids=lambda check: check.name)
def test_on_gpu(check: Check) -> None:
    try:
        check.run(torch.device("cuda:0"))
    except CannotRun as reason:
        pytest.skip(str(reason))
