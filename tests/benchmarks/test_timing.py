"""What the benchmarks do on a GPU, with stand-ins for NVML and for CUDA's events and graphs."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.harness import machine, nvml, timing
from benchmarks.harness.case import Case
from benchmarks.suites import row_pass
from mtp_ext.ops.top_classes import TopClasses


class FakeNVML:
    """As much of pynvml as is used; the clock falls from reading to reading, then rises."""

    NVML_CLOCK_SM, NVML_CLOCK_MEM = 1, 2

    class NVMLError(Exception):
        pass

    def __init__(self) -> None:
        self.clocks, self.bits, self.fails = [1980, 1200, 1500], [0, 0x4, 0x40], ""
        self.pid = os.getpid()

    def __getattr__(self, name: str) -> Any:
        answers: dict[str, Any] = {
            "nvmlInit": None,
            "nvmlDeviceGetHandleByUUID": "handle",
            "nvmlSystemGetDriverVersion": "580.1",
            "nvmlDeviceGetPowerUsage": 650_000,
            "nvmlDeviceGetMemoryInfo": SimpleNamespace(used=7 << 30),
            "nvmlDeviceGetComputeRunningProcesses": [SimpleNamespace(pid=self.pid, usedGpuMemory=5 << 30)],
        }

        def answer(*arguments: Any) -> Any:
            if name == self.fails:
                raise self.NVMLError("Not Supported")
            if name == "nvmlDeviceGetClockInfo":
                return 2619 if arguments[1] == self.NVML_CLOCK_MEM else self._next(self.clocks)
            return self._next(self.bits) if name == "nvmlDeviceGetCurrentClocksThrottleReasons" else answers[name]

        return answer

    def _next(self, values: list[int]) -> int:
        return values.pop(0) if len(values) > 1 else values[0]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeNVML:
    module = FakeNVML()
    monkeypatch.setitem(sys.modules, "pynvml", module)
    properties = SimpleNamespace(name="a GPU", total_memory=80 << 30, uuid="1-2")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    return module


def sampled(interval: float = 0.005, seconds: float = 0.1) -> dict[str, Any]:
    sampler = nvml.Sampler(interval)
    sampler.start()
    time.sleep(seconds)
    return sampler.stop()


def test_the_sampler_records_extremes_and_every_reason(fake: FakeNVML) -> None:
    found = sampled()
    assert found["samples"] > 3 and (found["sm_mhz_min"], found["sm_mhz_median"]) == (1200, 1500)
    assert found["throttle_reasons"] == ["software power cap", "hardware thermal"]
    assert (found["power_w_median"], found["memory_mhz_min"]) == (650, 2619)
    assert (found["device_bytes_max"], found["process_bytes_max"]) == (7 << 30, 5 << 30)


def test_it_reads_at_both_ends_of_a_short_group(fake: FakeNVML) -> None:
    assert sampled(interval=60, seconds=0)["samples"] == 2


def test_what_the_device_does_not_tell_is_null(fake: FakeNVML) -> None:
    fake.fails, fake.pid = "nvmlDeviceGetPowerUsage", -1
    found = sampled()
    assert (found["power_w_median"], found["process_bytes_max"], found["sm_mhz_min"]) == (None, None, 1200)


def test_without_nvml_there_is_a_reason(fake: FakeNVML, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.fails = "nvmlDeviceGetHandleByUUID"
    assert sampled(seconds=0)["note"] == "NVML: Not Supported"
    monkeypatch.setitem(sys.modules, "pynvml", None)  # as if it were not installed
    found = sampled(seconds=0)
    assert (found["sm_mhz_min"], found["throttle_reasons"], found["note"]) == (
        None,
        None,
        "nvidia-ml-py is not installed",
    )
    state = machine.gpu_state()
    assert (state["name"], state["driver"], state["note"]) == ("a GPU", None, "nvidia-ml-py is not installed")


def test_the_state_of_the_device_names_the_driver_and_the_reasons(fake: FakeNVML) -> None:
    fake.bits = [0x1 | 0x1000]
    state = machine.gpu_state()
    assert (state["driver"], state["sm_mhz"], state["throttle_reasons"]) == ("580.1", 1980, ["idle", "0x1000"])


class FakeGraph:
    replays = 0

    def replay(self) -> None:
        FakeGraph.replays += 1


@pytest.fixture
def cuda(fake: FakeNVML, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA's events, 8 ms apart, its streams and its graphs."""
    event = SimpleNamespace(record=lambda: None, synchronize=lambda: None, elapsed_time=lambda end: 8.0)
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: event)
    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, value in {
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": lambda s: contextlib.nullcontext(),
        "synchronize": lambda: None,
        "CUDAGraph": FakeGraph,
        "graph": lambda graph: contextlib.nullcontext(),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(timing, "flush_l2", lambda: None)
    FakeGraph.replays = 0


def test_short_calls_are_timed_as_a_replayed_graph(cuda: None) -> None:
    calls: list[str] = []
    cases = [Case("b", "short", {}, lambda: calls.append("short"), repeats=4), Case("b", "long", {}, lambda: None)]
    found = timing.time_group(cases, "cuda", rounds=3, seconds=60)
    assert found.milliseconds == {"short": [2.0] * 3, "long": [8.0] * 3}
    assert found.methods == {"short": "graph of 4 calls"}
    assert len(calls) == 5 and FakeGraph.replays == 4  # one to warm up, four captured; then only the graph runs
    assert found.gpu is not None and found.gpu["sm_mhz_min"] == 1200


def test_calls_that_cannot_be_captured_run_one_by_one(cuda: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(graph: FakeGraph) -> None:
        raise RuntimeError("not while capturing")

    monkeypatch.setattr(torch.cuda, "graph", refuse)
    calls: list[str] = []
    found = timing.time_group([Case("b", "x", {}, lambda: calls.append("x"), repeats=4)], "cuda", 1, 60)
    assert found.methods == {"x": "4 calls, no graph: RuntimeError: not while capturing"}
    assert len(calls) == 1 + 2 * 4 and found.milliseconds == {"x": [2.0]}


def test_on_the_cpu_repeated_calls_share_their_time() -> None:
    found = timing.time_group([Case("b", "x", {}, lambda: time.sleep(0.02), repeats=3)], "cpu", 1, 60)
    assert 20 <= found.milliseconds["x"][0] < 40 and found.methods == {"x": "3 calls"} and found.gpu is None


def test_decoding_reads_another_unembedding_with_every_call() -> None:
    seen: list[float] = []
    call = row_pass.in_turn(lambda w: seen.append(float(w)), [torch.tensor(1.0), torch.tensor(2.0)])
    for _ in range(3):
        call()
    assert seen == [1, 2, 1]
    read, ours, gemm = row_pass.decode_cases(2, 64, 100, "cpu")
    assert (read.impl, read.bytes, ours.repeats) == ("read", 2 * 64 * (100 + 2), row_pass.REPEATS)
    found, peer = ours.fn(), gemm.fn()
    assert isinstance(found, TopClasses) and found.ids.shape == (2, 1)
    assert torch.equal(found.ids[:, 0], peer.indices)  # type: ignore[attr-defined]
