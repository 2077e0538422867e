"""The peers of the GPU benchmark: who is absent is named, who is there is called as its authors have it."""

from __future__ import annotations

import json
import runpy
import signal
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import runner
from benchmarks.suites import gpu_peers

ROOT = Path(__file__).resolve().parents[2]


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, **members: Any) -> None:
    """A module of this name, and the packages above it."""
    parts = name.split(".")
    for i in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:i]), ModuleType(".".join(parts[:i])))
    for member, value in members.items():
        setattr(sys.modules[name], member, value)


def reference(hidden: Tensor, weight: Tensor, targets: Tensor, **options: Any) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight), targets)


def test_installed_peers_are_called_with_their_own_order(monkeypatch: pytest.MonkeyPatch) -> None:
    class Liger:
        def __call__(self, weight: Tensor, hidden: Tensor, targets: Tensor) -> Tensor:
            return reference(hidden, weight, targets)

    stand_in(
        monkeypatch,
        "liger_kernel.transformers.fused_linear_cross_entropy",
        LigerFusedLinearCrossEntropyLoss=Liger,
    )
    stand_in(monkeypatch, "quack.linear_cross_entropy", chunked_linear_cross_entropy=reference)
    stand_in(monkeypatch, "cut_cross_entropy", linear_cross_entropy=reference)
    found, absent = gpu_peers.published()
    assert absent == {} and found.keys() == gpu_peers.PUBLISHED.keys()
    hidden, weight, targets = torch.randn(6, 5), torch.randn(11, 5), torch.randint(11, (6,))
    for loss in found.values():
        assert gpu_peers.loss_error(loss, hidden, weight, targets)["loss_error"] < 1e-6
        wrong = gpu_peers.loss_error(lambda h, w, y, loss=loss: 2 * loss(h, w, y), hidden, weight, targets)
        assert abs(wrong["loss_error"] - 1) < 1e-5


def test_a_run_names_the_absent_and_compares_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process and without the peaks, each a process: tests/benchmarks/test_harness.py has them."""
    out = tmp_path / "out.json"
    monkeypatch.setattr(runner, "peak_on_cpu", lambda case, quick: None)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["gpu_peers", "--quick", "--device", "cpu", "--out", str(out)])
    runpy.run_path(str(ROOT / "benchmarks" / "suites" / "gpu_peers.py"), run_name="__main__")
    document = json.loads(out.read_text())
    rows = {row["impl"]: row for row in document["rows"]}
    assert {"gemms", "mtp_ext", "eager"} <= rows.keys()
    assert 0 <= rows["eager"]["loss_error"] < 1e-5 and rows["mtp_ext"]["baseline"] == "gemms"
    absent = document["env"]["absent"]
    assert set(gpu_peers.PUBLISHED) <= absent.keys() | rows.keys()
    assert all(reason for reason in absent.values())
