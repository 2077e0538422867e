"""The table of kernels on the CPU, where operators stand for them."""

from __future__ import annotations

import pytest

from benchmarks.suites.gpu_profile import kernels_of


def test_shares_and_gaps_add_up() -> None:
    rows = kernels_of("cpu", 64, 32, 1000)
    assert any(row["kernel"] == "mtp_ext::_fused_loss_" and row["calls"] == 1 for row in rows)
    assert rows[-1]["kernel"] == "gaps" and rows[-1]["us"] >= 0
    assert [row["us"] for row in rows[:-1]] == sorted((row["us"] for row in rows[:-1]), reverse=True)
    assert sum(row["share"] for row in rows) == pytest.approx(1.0, abs=0.02)
