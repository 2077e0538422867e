"""tests/gpu/run.py without a GPU: parts, failures, and a fresh process after an error that stays."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gpu import run
from tests.gpu.registry import PARTS, CannotRun, Check, all_checks


class Replaced(BaseException):
    """Stands for a process that has become another one."""

    def __init__(self, arguments: list[str]) -> None:
        self.arguments = arguments[3:]


@pytest.fixture
def lost(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Checks that pass, fail, cannot run and break the device; the names of those that ran."""
    ran: list[str] = []

    def make(name: str, part: str, error: Exception | None = None) -> Check:
        def function(device: torch.device) -> None:
            ran.append(name)
            if error is not None:
                raise error

        return Check(name, function, small=name == "fails", part=part)

    checks = [
        make("passes", "smoke"),
        make("fails", "early", ValueError("no")),
        make("breaks", "early", RuntimeError("illegal memory access")),
        make("cannot", "early", CannotRun("one GPU")),
        make("after", "late"),
    ]
    monkeypatch.setattr(run, "all_checks", lambda: checks)
    monkeypatch.setattr(run, "describe", lambda device: {})
    monkeypatch.setattr(run, "device_is_lost", lambda: ran[-1] == "breaks")
    monkeypatch.setattr(run, "alone", lambda name: f" {name} by itself")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    def replace(path: str, arguments: list[str]) -> None:
        raise Replaced(arguments)

    monkeypatch.setattr(os, "execv", replace)
    return ran


def outcomes(out: Path) -> dict[str, str]:
    document: dict[str, Any] = json.loads(out.read_text())
    return {entry["name"]: entry["outcome"] for entry in document["checks"]}


def test_what_follows_an_error_that_stays_runs_in_a_fresh_process(lost: list[str], tmp_path: Path) -> None:
    out = tmp_path / "checks.json"
    with pytest.raises(Replaced) as replaced:
        run.main(["--out", str(out)])
    assert outcomes(out) == {"passes": "passed", "fails": "failed", "breaks": "failed"}
    assert json.loads(out.read_text())["checks"][-1]["detail"].endswith("breaks by itself")
    assert run.main(replaced.value.arguments) == 1
    assert lost == ["passes", "fails", "breaks", "cannot", "after"]
    assert outcomes(out) == {
        **{"passes": "passed", "fails": "failed", "breaks": "failed"},
        **{"cannot": "skipped", "after": "passed"},
    }


def test_parts_and_short_checks(lost: list[str], tmp_path: Path) -> None:
    assert run.main(["--parts", "smoke", "late", "--out", str(tmp_path / "a.json")]) == 0
    assert run.main(["--small", "--out", str(tmp_path / "b.json")]) == 1
    assert lost == ["passes", "after", "fails"]
    assert run.main(["--alone", "passes"]) == 0
    with pytest.raises(SystemExit):
        run.main([])


def test_every_part_has_checks() -> None:
    parts = [check.part for check in all_checks()]
    assert sorted(set(parts)) == sorted(PARTS) and parts == sorted(parts, key=PARTS.index)
