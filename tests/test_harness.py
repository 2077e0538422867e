"""The benchmark harness: what it compares, what it writes, and that its memory figure is one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from benchmarks import harness
from benchmarks.harness import Case

ROOT = Path(__file__).resolve().parent.parent

MODULE = """
import torch
from functools import partial
from benchmarks.harness import Case, main

def hold(bytes):
    return torch.ones(bytes, dtype=torch.uint8)

def cases(device, quick):
    for size in (1,) if quick else (1, 2):
        for impl, factor in {"small": 1, "large": 3}.items():
            yield Case("hold", impl, {"size": size}, partial(hold, factor * 16 << 20), bytes=1)

if __name__ == "__main__":
    main(cases, baseline="small")
"""


def test_cases_are_interleaved_in_orders_that_change() -> None:
    calls: list[str] = []
    names = ("x", "y", "z")
    cases = [Case("b", name, {}, partial(calls.append, name)) for name in names]
    times = harness.time_group(cases, "cpu", rounds=20, seconds=60)
    rounds = [tuple(calls[i : i + 3]) for i in range(0, len(calls), 3)]
    assert len(rounds) == 21 and all(sorted(r) == sorted(names) for r in rounds)  # the first round is warm-up
    assert len(set(rounds)) > 3
    assert {name: len(values) for name, values in times.items()} == dict.fromkeys(names, 20)
    calls.clear()
    harness.time_group(cases, "cpu", rounds=20, seconds=60)
    assert [tuple(calls[i : i + 3]) for i in range(0, len(calls), 3)] == rounds, "the orders differ from run to run"


def test_a_slow_group_gets_fewer_rounds() -> None:
    cases = [Case("b", "slow", {}, partial(time.sleep, 0.05))]
    assert len(harness.time_group(cases, "cpu", rounds=100, seconds=0.01)["slow"]) == 1  # the warm-up is all there is
    assert 1 < len(harness.time_group(cases, "cpu", rounds=100, seconds=0.3)["slow"]) < 10


def test_the_ratio_is_taken_within_each_round() -> None:
    case = Case("b", "ours", {"N": 4}, lambda: None, flops=4_000_000)
    times = {"floor": [1.0, 10.0, 100.0], "ours": [2.0, 20.0, 200.0]}  # the machine slows down, the ratio stays
    result = harness.row(case, times, "floor", peak=7)
    assert (result["baseline_ratio"], result["ratio_p20"], result["ratio_p80"]) == (0.5, 0.5, 0.5)
    assert (result["ms_median"], result["gflop_per_s"], result["N"], result["peak_extra_bytes"]) == (20.0, 0.2, 4, 7)
    assert "baseline_ratio" not in harness.row(case, times, "absent", peak=None)


@pytest.mark.parametrize(("values", "expected"), [([3.0], (3, 3, 3)), ([1.0, 2, 3, 4, 5, 6], (2, 3.5, 5))])
def test_spread(values: list[float], expected: tuple[float, float, float]) -> None:
    assert harness.spread(values) == pytest.approx(expected)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "results" / "x.json"
    harness.write_atomically(path, {"rows": [1]})
    with pytest.raises(TypeError):
        harness.write_atomically(path, {"rows": [object()]})
    assert json.loads(path.read_text()) == {"rows": [1]} and os.listdir(path.parent) == ["x.json"]


def test_the_command_line_writes_rows_with_their_environment_and_peak_memory(tmp_path: Path) -> None:
    (tmp_path / "bench_hold.py").write_text(MODULE)
    command = [sys.executable, "-m", "bench_hold", "--device", "cpu", "--quick", "--rounds", "1", "--threads", "1"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT), str(ROOT / "python")])}
    done = subprocess.run(
        [*command, "--out", "o.json"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    document = json.loads((tmp_path / "o.json").read_text())
    assert {"commit", "dirty", "command", "torch", "cpu", "threads", "build"} <= set(document["env"])
    assert document["env"]["command"].startswith("python -m bench_hold --device cpu")
    small, large = document["rows"]
    assert (small["baseline_ratio"], large["impl"]) == (1.0, "large")
    if sys.platform == "linux":
        assert 15 << 20 <= small["peak_extra_bytes"] <= 18 << 20
        assert 46 << 20 <= large["peak_extra_bytes"] <= 50 << 20
