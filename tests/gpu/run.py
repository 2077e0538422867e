"""Runs the checks that need a GPU with nothing but torch: ``python -m tests.gpu.run [--small] --out FILE.json``.

The file is rewritten after every check, so that a run that is cut off leaves what it found.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.machine import describe
from benchmarks.harness.runner import write_atomically
from tests.gpu.registry import CannotRun, all_checks


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="only the short checks, as for compute-sanitizer")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    document: dict[str, Any] = {"env": describe("cuda"), "checks": []}
    for check in all_checks():
        if args.small and not check.small:
            continue
        torch.manual_seed(0)
        start, outcome, detail = time.monotonic(), "passed", ""
        try:
            check.run(torch.device("cuda:0"))
            torch.cuda.synchronize()
        except CannotRun as reason:
            outcome, detail = "skipped", str(reason)
        except Exception:  # whatever it is, the next check runs
            outcome, detail = "failed", traceback.format_exc(limit=8)
        seconds = round(time.monotonic() - start, 2)
        document["checks"].append({"name": check.name, "outcome": outcome, "seconds": seconds, "detail": detail})
        write_atomically(args.out, document)
        print(f"{outcome:8s} {seconds:7.2f} s  {check.name}  {detail}", flush=True)
    return int(any(entry["outcome"] == "failed" for entry in document["checks"]))


if __name__ == "__main__":
    sys.exit(main())
