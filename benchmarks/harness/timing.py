"""Times the cases of a group round robin, and tolerates failing cases."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.harness import nvml
from benchmarks.harness.case import Case, short

L2_FLUSH_BYTES = 256 << 20  # more than any L2 cache


class CutOff(BaseException):
    """Ends the run, which writes its results so far. Not an ``Exception``, so that no case can swallow it."""


@dataclass
class Timings:
    """The measurements of a group, by implementation."""

    milliseconds: dict[str, list[float]]  # per call; the i-th values of all belong to the same round
    errors: dict[str, str] = field(default_factory=dict)
    methods: dict[str, str] = field(default_factory=dict)  # for cases whose calls are timed together
    gpu: dict[str, Any] | None = None  # clocks and memory during the timed rounds
    cut_off: bool = False

    def fail(self, impl: str, error: Exception) -> None:
        """Records an error and drops the times, whose ratios would belong to other rounds than the peers'."""
        self.errors[impl] = short(error)
        self.milliseconds[impl] = []

    def drop_warm_up(self) -> None:
        """Drops the first round, unless it is the only one."""
        if any(len(values) > 1 for values in self.milliseconds.values()):
            self.milliseconds = {impl: values[1:] for impl, values in self.milliseconds.items()}


def call_repeatedly(case: Case) -> None:
    for _ in range(case.repeats):
        case.fn()


def captured(case: Case) -> tuple[Callable[[], None], str]:
    """Captures the calls of a case as a CUDA graph, else runs them one by one; also returns the method's name."""
    try:
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # one-time setup must not be captured
            case.fn()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call_repeatedly(case)
    except Exception as error:
        return lambda: call_repeatedly(case), f"{case.repeats} calls, no graph: {short(error)}"
    return graph.replay, f"graph of {case.repeats} calls"


def flush_l2() -> None:
    torch.empty(L2_FLUSH_BYTES, dtype=torch.int8, device="cuda").zero_()


class Timer:
    """Measures milliseconds per call of a case: wall clock on the CPU, events after an L2 flush on a GPU."""

    def __init__(self, case: Case, device: str) -> None:
        self.case, self.device = case, device
        self.method = "" if case.repeats == 1 else f"{case.repeats} calls"
        self._run: Callable[[], None] | None = None

    def __call__(self) -> float:
        if self._run is None:
            self._run = self._prepare()
        if self.device == "cpu":
            start = time.perf_counter()
            self._run()
            return 1e3 * (time.perf_counter() - start) / self.case.repeats
        flush_l2()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        self._run()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / self.case.repeats

    def _prepare(self) -> Callable[[], None]:
        if self.device == "cpu" or self.case.repeats == 1:
            return lambda: call_repeatedly(self.case)
        run, self.method = captured(self.case)
        return run


def free_memory(device: str) -> None:
    """Frees the memory of a failed case, if the device still responds."""
    gc.collect()
    if device == "cuda":
        try:
            torch.cuda.empty_cache()
        except RuntimeError as error:  # a kernel error is sticky: all later cases will fail with it
            print(f"  the memory of the failed case stays: {short(error)}", flush=True)


def _rounds(
    timings: Timings, timers: dict[str, Timer], rounds: int, until: float, sampler: nvml.Sampler | None
) -> None:
    order = random.Random(0)
    for round_index in range(rounds + 1):
        if round_index > 0 and time.perf_counter() > until:
            return
        if round_index == 1 and sampler is not None:
            sampler.start()
        for impl in order.sample(list(timers), len(timers)):
            if impl in timings.errors:
                continue
            try:
                timings.milliseconds[impl].append(timers[impl]())
                continue
            except Exception as error:
                timings.fail(impl, error)
            free_memory(timers[impl].device)  # after the except block, which keeps the frames alive


def time_group(cases: list[Case], device: str, rounds: int, seconds: float) -> Timings:
    """Times all cases round by round; the first round (a warm-up) is dropped unless it is the only one.

    Each round has its own random order, reproducible between runs, so that the state that a case leaves behind (caches,
    freed pages) does not always affect the same next one. Failed cases are skipped from then on; :class:`CutOff` ends
    the rounds.
    """
    timings = Timings({case.impl: [] for case in cases})
    timers = {case.impl: Timer(case, device) for case in cases}
    sampler = nvml.Sampler() if device == "cuda" else None
    try:
        _rounds(timings, timers, rounds, time.perf_counter() + seconds, sampler)
    except CutOff:
        timings.cut_off = True
    if sampler is not None:
        timings.gpu = sampler.stop()
    timings.methods = {impl: timer.method for impl, timer in timers.items() if timer.method}
    timings.drop_warm_up()
    return timings
