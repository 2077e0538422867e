"""Measures implementations against each other, interleaved, and writes JSON.

A benchmark module yields :class:`Case` objects and calls :func:`main`. Cases of one benchmark and shape form a group,
which is measured round robin in one process, because clocks drift by more than the differences of interest: every round
runs each case once, and ratios to the baseline are computed within a round. Peak memory is measured separately from
time: by the CUDA allocator, or on the CPU as the resident high-water mark of a fresh process that runs one case.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import math
import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch

from benchmarks.harness.case import Case, Cases, groups, short
from benchmarks.harness.machine import describe
from benchmarks.harness.peaks import beyond_peak
from benchmarks.harness.timing import CutOff, Timings, time_group
from mtp_ext.ops.common.workspace import release_workspace

__all__ = ["Case", "Cases", "main", "write_atomically"]


def spread(values: list[float]) -> tuple[float, float, float]:
    """Returns the 20th percentile, the median and the 80th percentile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return fifths[0], statistics.median(values), fifths[3]


def row(case: Case, timings: Timings, baseline: str | None, peak: int | None) -> dict[str, Any]:
    """Builds a result row. ``baseline_ratio`` is baseline time / own time: 1 is as fast, 0.5 takes twice as long.

    A case that failed, or was cut off before a timed round, has an ``error`` instead of times.
    """
    result: dict[str, Any] = {"benchmark": case.benchmark, "impl": case.impl, **case.shape}
    own = timings.milliseconds[case.impl]
    if not own:
        return result | {
            "error": timings.errors.get(case.impl, "cut off before a timed round"),
            "peak_extra_bytes": None,
        }
    p20, median, p80 = spread(own)
    result |= {"ms_p20": round(p20, 5), "ms_median": round(median, 5), "ms_p80": round(p80, 5), "rounds": len(own)}
    if case.impl in timings.methods:
        result["timed"] = timings.methods[case.impl]
    reference = timings.milliseconds.get(baseline or "", [])
    if reference:
        # an interrupted round lacks the values of the remaining cases
        low, middle, high = spread([b / mine for b, mine in zip(reference, own, strict=False)])
        result |= {"baseline": baseline, "baseline_ratio": round(middle, 4)}
        result |= {"ratio_p20": round(low, 4), "ratio_p80": round(high, 4)}
    if case.flops:
        result["gflop_per_s"] = round(case.flops / median / 1e6, 2)
    if case.bytes:
        result |= {"bytes": case.bytes, "gb_per_s": round(case.bytes / median / 1e6, 2)}
    result |= {"peak_extra_bytes": peak}
    if timings.gpu is not None:
        result["gpu"] = timings.gpu
        if excess := beyond_peak(result, torch.cuda.get_device_name()):
            result["error"] = excess
    return result


def peak_on_gpu(case: Case) -> int:
    """Returns the peak bytes that one call allocates beyond the memory in use before it."""
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
    """Returns the bytes by which one warm call raises this process's resident memory. Run it in a separate process."""
    case.fn()  # warm-up: loaded code and threads are not the case's memory
    gc.collect()
    release_workspace()  # so that the workspace counts
    ctypes.CDLL(None).malloc_trim(0)
    before = _resident_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    case.fn()
    return max(0, _resident_bytes("VmHWM") - before)


def peak_on_cpu(case: Case, quick: bool) -> int | None:
    """Runs :func:`peak_here` in a fresh process, whose allocator returns large blocks at once; Linux only."""
    module = sys.modules["__main__"].__spec__
    if module is None or not Path("/proc/self/clear_refs").exists():
        return None
    command = [sys.executable, "-m", module.name, "--device", "cpu", "--threads", str(torch.get_num_threads())]
    command += ["--peak-of", case.key, *["--quick"] * quick]
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
    return int(done.stdout.splitlines()[-1])


def write_atomically(path: Path, document: Mapping[str, Any]) -> None:
    """Writes JSON atomically: readers and interrupted runs never see a partial file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(document, indent=1) + "\n")
    temporary.replace(path)


def show(result: Mapping[str, Any]) -> None:
    if "error" in result:
        print(f"  {result['impl']:24s} {result['error']}", flush=True)
        return
    ratio = f"{result['baseline_ratio']:6.3f} of {result['baseline']}" if "baseline_ratio" in result else ""
    peak = f"{result['peak_extra_bytes'] / 2**20:9.1f} MiB extra" if result["peak_extra_bytes"] is not None else ""
    print(f"  {result['impl']:24s} {result['ms_median']:10.3f} ms  {ratio}  {peak}", flush=True)


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
    parser.add_argument("--out", type=Path, help="the JSON file, rewritten after every case")
    parser.add_argument("--peak-of", metavar="KEY", help=argparse.SUPPRESS)  # for this module's own subprocess
    return parser.parse_args()


class Recorder:
    """The result file of a run, rewritten after every row."""

    def __init__(self, out: Path | None, env: dict[str, Any]) -> None:
        self.out, self.env, self.rows = out, env, list[dict[str, Any]]()
        self.n_failed = 0

    def add(self, result: dict[str, Any]) -> None:
        self.rows.append(result)
        self.n_failed += any(key.startswith("error") for key in result)
        show(result)
        if self.out is not None:
            write_atomically(self.out, {"env": self.env, "rows": self.rows})


def more_of(case: Case, device: str, quick: bool) -> dict[str, Any]:
    """Measures peak memory and facts of a case after the timing; errors are recorded in their place."""
    more: dict[str, Any] = {}
    if case.measure_peak:
        try:
            more["peak_extra_bytes"] = peak_on_gpu(case) if device == "cuda" else peak_on_cpu(case, quick)
        except Exception as error:
            more |= {"peak_extra_bytes": None, "error_of_peak": short(error)}
    if case.facts is not None:
        try:
            more |= case.facts()
        except Exception as error:
            more["error_of_facts"] = short(error)
    return more


def record_group(group: list[Case], args: argparse.Namespace, baselines: Sequence[str], recorder: Recorder) -> None:
    """Measures a group and records a row per case; if cut off, without memory and facts.

    Raises:
        CutOff: After the rows are written.
    """
    names = [case.impl for case in group]
    if len(set(names)) != len(names):
        raise ValueError(f"group '{group[0].group}' has two cases of one name: {names}")
    print(group[0].group, flush=True)
    rounds = args.rounds or (2 if args.quick else 10 if args.device == "cpu" else 50)
    timings = time_group(group, args.device, rounds, args.seconds)
    baseline = next((name for name in baselines if name in names), None)
    for case in group:
        more: dict[str, Any] = {}
        if not timings.cut_off and timings.milliseconds[case.impl]:
            try:
                more = more_of(case, args.device, args.quick)
            except CutOff:
                timings.cut_off = True
        recorder.add(row(case, timings, baseline, None) | more)
    if timings.cut_off:
        raise CutOff


def _cut_off(number: int, frame: FrameType | None) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the results are being written from here on
    raise CutOff


def main(
    cases: Cases,
    *,
    baseline: str | Sequence[str] = (),
    description: str | None = None,
    facts: Callable[[], Mapping[str, Any]] | None = None,
) -> None:
    """Runs a benchmark module's command line.

    A failing case becomes a row with an ``error``, and the next one runs; on SIGTERM the results so far are written.
    Either makes the exit status 1.

    Args:
        cases: Called with the device and the quick flag; inputs are generated from a fixed seed.
        baseline: The implementation that ratios refer to; of several, the first that a group has.
        description: Shown by ``--help``.
        facts: Returns additional fields of the file's ``env``.
    Raises:
        ValueError: Two cases of a group have the same name.
    """
    args = arguments(description)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    every = cases(args.device, args.quick)
    if args.peak_of is not None:
        print(peak_here(next(case for case in every if case.key == args.peak_of)))
        return
    recorder = Recorder(args.out, describe(args.device) | (dict(facts()) if facts is not None else {}))
    signal.signal(signal.SIGTERM, _cut_off)
    try:
        for group in groups(every):
            record_group(group, args, [baseline] if isinstance(baseline, str) else baseline, recorder)
    except CutOff:
        sys.exit("cut off: the rest is not measured")
    if recorder.n_failed:
        sys.exit(f"{recorder.n_failed} cases failed")
