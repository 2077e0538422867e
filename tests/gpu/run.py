"""Runs the checks that need a GPU with nothing but torch: ``python -m tests.gpu.run [--small] --out FILE.json``.

The file is rewritten after every check, so that a run that is cut off leaves what it found. An illegal access makes all
later calls of its process fail: the checks after it run in a fresh one, and it runs once more by itself, with launches
that wait, to name the kernel.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.machine import describe
from benchmarks.harness.runner import write_atomically
from tests.gpu.registry import PARTS, CannotRun, Check, all_checks

ALONE_SECONDS = 60


def outcome_of(check: Check) -> dict[str, Any]:
    """Runs a check; returns its entry of the file."""
    torch.manual_seed(0)
    start, outcome, detail = time.monotonic(), "passed", ""
    try:
        check.run(torch.device("cuda:0"))
        torch.cuda.synchronize()
    except CannotRun as reason:
        outcome, detail = "skipped", str(reason)
    except Exception:  # whatever it is, the next check runs
        outcome, detail = "failed", traceback.format_exc(limit=8)
    return {"name": check.name, "outcome": outcome, "seconds": round(time.monotonic() - start, 2), "detail": detail}


def device_is_lost() -> bool:
    """Returns True if an error stays with this process, whose every later use of the GPU fails."""
    try:
        torch.cuda.synchronize()
        return torch.ones(2, device="cuda").sum().item() != 2
    except RuntimeError:
        return True


def alone(name: str) -> str:
    """Runs a check again in a process of its own whose launches wait; returns the end of what it says."""
    command = [sys.executable, "-m", "tests.gpu.run", "--alone", name]
    try:
        done = subprocess.run(
            command,
            env=os.environ | {"CUDA_LAUNCH_BLOCKING": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=ALONE_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return f"\nby itself, with launches that wait: no end after {ALONE_SECONDS} s"
    return f"\nby itself, with launches that wait: exit {done.returncode}\n{done.stdout[-2000:]}"


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="only the short checks, as for compute-sanitizer")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default: all")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--after", metavar="NAME", help=argparse.SUPPRESS)  # goes on with the file of another process
    parser.add_argument("--alone", metavar="NAME", help=argparse.SUPPRESS)
    args = parser.parse_args(given)
    if args.out is None and args.alone is None:
        parser.error("--out is missing")
    return args


def main(given: Sequence[str] | None = None) -> int:
    args = arguments(given)
    checks = all_checks()
    if args.alone is not None:
        next(check for check in checks if check.name == args.alone).run(torch.device("cuda:0"))
        torch.cuda.synchronize()
        return 0
    checks = [check for check in checks if check.part in args.parts and (check.small or not args.small)]
    document: dict[str, Any] = {"env": describe("cuda"), "checks": []}
    if args.after is not None:
        document = json.loads(args.out.read_text())
        checks = checks[[check.name for check in checks].index(args.after) + 1 :]
    for check in checks:
        entry = outcome_of(check)
        document["checks"].append(entry)
        write_atomically(args.out, document)
        lost = entry["outcome"] == "failed" and device_is_lost()
        if lost:
            entry["detail"] += alone(check.name)
            write_atomically(args.out, document)
        print(f"{entry['outcome']:8s} {entry['seconds']:7.2f} s  {check.name}  {entry['detail']}", flush=True)
        if lost:
            options = [*(["--small"] if args.small else []), "--parts", *args.parts, "--out", str(args.out)]
            os.execv(sys.executable, [sys.executable, "-m", "tests.gpu.run", *options, "--after", check.name])
    return int(any(entry["outcome"] == "failed" for entry in document["checks"]))


if __name__ == "__main__":
    sys.exit(main())
