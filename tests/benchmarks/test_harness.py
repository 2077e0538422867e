"""The benchmark harness: what it compares, what it writes, and that its memory figure is one."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from benchmarks.harness import case as cases_module
from benchmarks.harness import machine
from benchmarks.harness import runner as harness
from benchmarks.harness.case import Case
from benchmarks.harness.timing import CutOff, Timings, time_group

ROOT = Path(__file__).resolve().parents[2]

MODULE = """
import torch
from functools import partial
from benchmarks.harness.runner import Case, main

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
    times = time_group(cases, "cpu", rounds=20, seconds=60).milliseconds
    rounds = [tuple(calls[i : i + 3]) for i in range(0, len(calls), 3)]
    assert len(rounds) == 21 and all(sorted(r) == sorted(names) for r in rounds)  # the first round is warm-up
    assert len(set(rounds)) > 3
    assert {name: len(values) for name, values in times.items()} == dict.fromkeys(names, 20)
    calls.clear()
    time_group(cases, "cpu", rounds=20, seconds=60)
    assert [tuple(calls[i : i + 3]) for i in range(0, len(calls), 3)] == rounds, "the orders differ from run to run"


def test_a_slow_group_gets_fewer_rounds() -> None:
    cases = [Case("b", "slow", {}, partial(time.sleep, 0.05))]
    assert (
        len(time_group(cases, "cpu", rounds=100, seconds=0.01).milliseconds["slow"]) == 1
    )  # the warm-up is all there is
    assert 1 < len(time_group(cases, "cpu", rounds=100, seconds=0.3).milliseconds["slow"]) < 10


def test_the_ratio_is_taken_within_each_round() -> None:
    case = Case("b", "ours", {"N": 4}, lambda: None, flops=4_000_000)
    times = Timings(
        {"floor": [1.0, 10.0, 100.0], "ours": [2.0, 20.0, 200.0]}
    )  # the machine slows down, the ratio stays
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


@pytest.mark.slow
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


def fail_at(call: int, error: BaseException, calls: list[int]) -> None:
    calls.append(1)
    if len(calls) == call:
        raise error


def test_a_case_that_fails_has_an_error_and_its_peers_their_times() -> None:
    calls: list[int] = []
    floor = Case("b", "floor", {}, partial(fail_at, 3, RuntimeError("out of memory"), calls))
    ours = Case("b", "ours", {}, lambda: None)
    timings = time_group([floor, ours], "cpu", rounds=5, seconds=60)
    assert len(calls) == 3 and len(timings.milliseconds["ours"]) == 5
    assert harness.row(floor, timings, "floor", None)["error"] == "RuntimeError: out of memory"
    assert "baseline_ratio" not in harness.row(ours, timings, "floor", None)


def test_a_round_that_is_cut_off_pairs_only_what_it_measured() -> None:
    # Three cases, cut off by the last call of the second timed round: two of them have one value more.
    calls: list[int] = []
    cases = [Case("b", name, {}, partial(fail_at, 9, CutOff(), calls)) for name in ("x", "y", "z")]
    timings = time_group(cases, "cpu", rounds=5, seconds=60)
    assert timings.cut_off and sorted(map(len, timings.milliseconds.values())) == [1, 2, 2]
    assert all("baseline_ratio" in harness.row(case, timings, "x", None) for case in cases)
    calls.clear()
    cases = [Case("b", name, {}, partial(fail_at, 2, CutOff(), calls)) for name in ("x", "y")]
    timings = time_group(cases, "cpu", rounds=5, seconds=60)
    rows = [harness.row(case, timings, None, None) for case in cases]
    assert sum(row.get("error") == "cut off before a timed round" for row in rows) == 1


def test_inputs_that_cannot_be_made_cost_their_own_group_only() -> None:
    def made(size: int) -> Iterator[Case]:
        yield Case("b", "x", {"size": size}, lambda: None)
        if size == 1:
            raise MemoryError("no room")
        yield Case("b", "y", {"size": size}, lambda: None)

    found = list(cases_module.groups(cases_module.each(partial(made, size) for size in (1, 2))))
    assert [[case.impl for case in group] for group in found] == [["x"], ["inputs"], ["x", "y"]]
    with pytest.raises(MemoryError, match="no room"):
        found[1][0].fn()
    assert [[case.impl for case in group] for group in cases_module.groups(made(1))] == [["x"], ["inputs"]]


@pytest.mark.parametrize(("text", "dirty"), [("0", False), ("1", True), ("", None)])
def test_the_environment_tells_the_commit_of_a_tree_without_git(
    text: str, dirty: bool | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.delenv("MTP_COMMIT", raising=False)
    assert machine.source() == {"commit": None, "dirty": None}
    monkeypatch.setenv("MTP_COMMIT", "0123abc")
    monkeypatch.setenv("MTP_DIRTY", text)
    assert machine.source() == {"commit": "0123abc", "dirty": dirty}


SLOW_MODULE = """
import time
from benchmarks.harness.runner import Case, main

def cases(device, quick):
    yield Case("first", "works", {}, lambda: None, measure_peak=False, facts=lambda: {"found": 3})
    yield Case("first", "fails", {}, lambda: 1 / 0, measure_peak=False)
    yield Case("second", "slow", {}, lambda: (time.sleep(0.2), print("called", flush=True)), measure_peak=False)

if __name__ == "__main__":
    main(cases, facts=lambda: {"peers": "none"})
"""


@pytest.mark.slow
def test_sigterm_writes_what_was_measured_and_a_failure_ends_nothing(tmp_path: Path) -> None:
    (tmp_path / "bench_slow.py").write_text(SLOW_MODULE)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT), str(ROOT / "python")])}
    command = [sys.executable, "-m", "bench_slow", "--device", "cpu", "--rounds", "100", "--out", "o.json"]
    with subprocess.Popen(command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for _ in range(3):  # the warm-up and a timed round are over
            while process.stdout.readline() not in ("called\n", ""):
                pass
        process.terminate()
        process.stdout.read()
        assert process.wait(timeout=30) == 1
    document = json.loads((tmp_path / "o.json").read_text())
    works, fails, slow = document["rows"]
    assert (works["rounds"], works["found"], document["env"]["peers"]) == (100, 3, "none")
    assert fails["error"] == "ZeroDivisionError: division by zero" and "ms_median" not in fails
    assert slow["ms_median"] >= 200 and 1 <= slow["rounds"] < 20


@pytest.mark.parametrize(
    ("figures", "name", "error"),
    [
        ({"gflop_per_s": 700e3, "gb_per_s": 3000.0}, "NVIDIA H100 80GB HBM3", None),
        ({"gflop_per_s": 1.2e6}, "NVIDIA H100 80GB HBM3", "more than the chip can do: 1.2e+06 gflop_per_s of 989400"),
        ({"gb_per_s": 4000.0}, "NVIDIA H100 80GB HBM3", "4000 gb_per_s of 3352"),
        ({"gb_per_s": 4000.0}, "NVIDIA H200", None),
        ({"gb_per_s": 1e6}, "another one", None),
    ],
)
def test_more_than_a_chip_can_do_is_an_error(
    figures: dict[str, float], name: str, error: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case("copy", "ours", {}, lambda: None, flops=0, bytes=0)
    timings = Timings({"ours": [1.0, 1.0]}, gpu={})
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: name)
    amount = {"flops": int(figures.get("gflop_per_s", 0) * 1e6), "bytes": int(figures.get("gb_per_s", 0) * 1e6)}
    found = harness.row(dataclasses.replace(case, **amount), timings, None, None)
    assert ("error" not in found) if error is None else (error in found["error"])
