"""Measures implementations against each other, interleaved, and writes JSON.

A benchmark module yields :class:`Case` objects and calls :func:`main`. Cases of one benchmark and shape form a group,
which is measured round robin in one process, since clocks drift by more than the differences of interest: every round
runs each case once, and a case's ratio to the baseline is taken within the round. Peak memory is measured apart from
time: by the CUDA allocator, or for the CPU as the resident high-water mark of a fresh process that runs one case.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import itertools
import json
import math
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import describe, gpu_state
from mtp_ext.ops.allocation import release_workspace

L2_FLUSH_BYTES = 256 << 20  # more than any L2 cache


@dataclass(frozen=True)
class Case:
    """One implementation at one shape.

    Args:
        benchmark: What is measured; with ``shape`` it names the group whose cases are compared.
        impl: The implementation; unique in its group.
        shape: Sizes and dtypes, for the reader and as part of the key.
        fn: One call of it. What it returns is dropped after the call, and counts towards its peak memory.
        flops: Floating-point operations of one call, 0 if it has no use.
        bytes: Bytes that one call has to move, 0 if it has no use.
        measure_peak: Whether its memory is of interest; on a CPU that takes two more calls in a process of their own.
    """

    benchmark: str
    impl: str
    shape: Mapping[str, int | str]
    fn: Callable[[], object]
    flops: int = 0
    bytes: int = 0
    measure_peak: bool = True

    @property
    def group(self) -> str:
        return " ".join([self.benchmark, *(f"{name}={value}" for name, value in self.shape.items())])

    @property
    def key(self) -> str:
        return f"{self.group} {self.impl}"


Cases = Callable[[str, bool], Iterable[Case]]  # (device, quick) -> cases, the cases of a group in a row


def time_once(case: Case, device: str) -> float:
    """Milliseconds of one call: wall clock on the CPU, events after an L2 flush on a GPU."""
    if device == "cpu":
        start = time.perf_counter()
        case.fn()
        return 1e3 * (time.perf_counter() - start)
    torch.empty(L2_FLUSH_BYTES, dtype=torch.int8, device=device).zero_()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begin.record()
    case.fn()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end))


def time_group(cases: list[Case], device: str, rounds: int, seconds: float) -> dict[str, list[float]]:
    """Milliseconds per implementation and round, the first round (a warm-up) dropped unless time allows no other.

    Every round has an order of its own, the same in every run: what a case leaves behind (caches, freed pages) must not
    always meet the same next one.
    """
    times: dict[str, list[float]] = {case.impl: [] for case in cases}
    order, start = random.Random(0), time.perf_counter()
    for round_index in range(rounds + 1):
        if round_index > 0 and time.perf_counter() - start > seconds:
            break
        for case in order.sample(cases, len(cases)):
            times[case.impl].append(time_once(case, device))
    return {impl: values[1:] or values for impl, values in times.items()}


def spread(values: list[float]) -> tuple[float, float, float]:
    """The 20th percentile, the median and the 80th percentile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return fifths[0], statistics.median(values), fifths[3]


def row(case: Case, times: Mapping[str, list[float]], baseline: str | None, peak: int | None) -> dict[str, Any]:
    """One line of the result. ``baseline_ratio`` is baseline time / own time: 1 is as fast, 0.5 takes twice as long."""
    result: dict[str, Any] = {"benchmark": case.benchmark, "impl": case.impl, **case.shape}
    p20, median, p80 = spread(times[case.impl])
    result |= {"ms_p20": round(p20, 4), "ms_median": round(median, 4), "ms_p80": round(p80, 4)}
    result |= {"rounds": len(times[case.impl])}
    if baseline is not None and baseline in times:
        ratios = [b / own for b, own in zip(times[baseline], times[case.impl], strict=True)]
        low, middle, high = spread(ratios)
        result |= {"baseline": baseline, "baseline_ratio": round(middle, 4)}
        result |= {"ratio_p20": round(low, 4), "ratio_p80": round(high, 4)}
    if case.flops:
        result["gflop_per_s"] = round(case.flops / median / 1e6, 2)
    if case.bytes:
        result["gb_per_s"] = round(case.bytes / median / 1e6, 2)
    return result | {"peak_extra_bytes": peak}


def peak_on_gpu(case: Case) -> int:
    """Bytes that one call allocates beyond what stands before it."""
    case.fn()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    case.fn()
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated() - before)


def _resident_bytes(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(f"{field}:"))


def peak_here(case: Case) -> int:
    """Bytes by which one call lifts this process's resident memory, once warm. Meant for a process of its own."""
    case.fn()  # loads code and starts threads: not the case's memory
    gc.collect()
    release_workspace()  # counts: a call brings it
    ctypes.CDLL(None).malloc_trim(0)
    before = _resident_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    case.fn()
    return max(0, _resident_bytes("VmHWM") - before)


def peak_on_cpu(case: Case, module: str, quick: bool) -> int | None:
    """:func:`peak_here` in a fresh process, whose allocator gives every large block back at once; Linux only."""
    if not Path("/proc/self/clear_refs").exists():
        return None
    command = [sys.executable, "-m", module, "--device", "cpu", "--threads", str(torch.get_num_threads())]
    command += ["--peak-of", case.key, *["--quick"] * quick]
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
    return int(done.stdout.splitlines()[-1])


def write_atomically(path: Path, document: Mapping[str, Any]) -> None:
    """A reader, or a run that is cut off, sees the file before or after, never between."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(document, indent=1) + "\n")
    temporary.replace(path)


def show(result: Mapping[str, Any]) -> None:
    ratio = f"{result['baseline_ratio']:6.3f} of {result['baseline']}" if "baseline_ratio" in result else ""
    peak = f"{result['peak_extra_bytes'] / 2**20:9.1f} MiB extra" if result["peak_extra_bytes"] is not None else ""
    print(f"  {result['impl']:24s} {result['ms_median']:10.2f} ms  {ratio}  {peak}", flush=True)


def arguments(description: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--quick", action="store_true", help="tiny shapes, to see that it works; the numbers mean nothing"
    )
    parser.add_argument(
        "--rounds", type=int, help="timed calls of every case (default: 2 with --quick, 10 on the CPU, 50)"
    )
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="begin no further round of a group after this time"
    )
    parser.add_argument("--threads", type=int, help="torch's threads (default: torch's own choice)")
    parser.add_argument("--out", type=Path, help="the JSON file, rewritten after every group")
    parser.add_argument("--peak-of", metavar="KEY", help=argparse.SUPPRESS)  # how this module calls itself
    return parser.parse_args()


def main(cases: Cases, *, baseline: str | None = None, description: str | None = None) -> None:
    """Runs a benchmark module's command line.

    Args:
        cases: Called with the device and whether to be quick; inputs are made from a fixed seed.
        baseline: The implementation that ratios are taken to, where a group has it.
        description: Shown by ``--help``.
    Raises:
        ValueError: Two cases of a group have one name.
    """
    args = arguments(description)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    every = cases(args.device, args.quick)
    if args.peak_of is not None:
        print(peak_here(next(case for case in every if case.key == args.peak_of)))
        return
    rounds = args.rounds or (2 if args.quick else 10 if args.device == "cpu" else 50)
    module = sys.modules["__main__"].__spec__
    document: dict[str, Any] = {"env": describe(args.device), "rows": []}
    for name, members in itertools.groupby(every, key=lambda case: case.group):
        group = list(members)
        if len({case.impl for case in group}) != len(group):
            raise ValueError(f"group '{name}' has two cases of one name: {[case.impl for case in group]}")
        print(name, flush=True)
        times = time_group(group, args.device, rounds, args.seconds)
        on_gpu = args.device == "cuda"
        for case in group:
            peak: int | None = None
            if case.measure_peak:
                peak = peak_on_gpu(case) if on_gpu else peak_on_cpu(case, module.name, args.quick) if module else None
            document["rows"].append(row(case, times, baseline, peak) | ({"gpu": gpu_state()} if on_gpu else {}))
            show(document["rows"][-1])
            if args.out is not None:
                write_atomically(args.out, document)
