"""Where the time of one loss goes on a GPU: each kernel by name, and the gaps between kernels.

``python -m benchmarks.suites.gpu_profile --device cuda --out FILE.json``.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

import mtp_ext
from benchmarks.harness.machine import describe
from benchmarks.harness.runner import write_atomically

SHAPES = ((16384, 1024, 32000), (16384, 4096, 32000), (16384, 4096, 128256), (2048, 1024, 32000))
SMALL = ((64, 32, 1000),)


def kernels_of(device: str, n_rows: int, width: int, vocab: int) -> list[dict[str, Any]]:
    """Profiles one warm forward and backward.

    Returns:
        A row per kernel, the slowest first: calls, microseconds, share of the time from the first kernel's start to the
        last one's end; and one named "gaps" for what lies between kernels.
    """
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    hidden = torch.randn(n_rows, width, device=device, dtype=dtype).requires_grad_()
    weight = torch.randn(vocab, width, device=device, dtype=dtype).mul_(0.05).requires_grad_()
    targets = torch.randint(vocab, (n_rows,), device=device)

    def step() -> None:
        torch.autograd.grad(mtp_ext.linear_cross_entropy(hidden, weight, targets), (hidden, weight))
        if device == "cuda":
            torch.cuda.synchronize()

    step()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    with profile(activities=activities) as seen:
        step()
    spans: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for event in seen.events():
        if event.device_type.name == device.upper() and event.cpu_parent is None:
            spans[event.name].append((event.time_range.start, event.time_range.end))
    every = sorted(span for found in spans.values() for span in found)
    whole = max(end for _, end in every) - every[0][0]
    busy, until = 0.0, every[0][0]
    for start, end in every:
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    found = {name: (len(of_one), sum(end - start for start, end in of_one)) for name, of_one in spans.items()}
    rows = [*sorted(found.items(), key=lambda entry: -entry[1][1]), ("gaps", (0, whole - busy))]
    shape = {"N": n_rows, "D": width, "V": vocab}
    return [
        {**shape, "kernel": name, "calls": calls, "us": round(us, 2), "share": round(us / whole, 4)}
        for name, (calls, us) in rows
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="a tiny shape")
    parser.add_argument("--out", type=Path, help="the JSON file, rewritten after every shape")
    args = parser.parse_args()
    document: dict[str, Any] = {"env": describe(args.device), "rows": []}
    for shape in SMALL if args.quick or args.device == "cpu" else SHAPES:
        document["rows"] += kernels_of(args.device, *shape)
        for row in document["rows"]:
            if (row["N"], row["D"], row["V"]) == shape:
                print(f"{row['share']:7.1%} {row['us']:12.1f} us {row['calls']:5d}  {row['kernel'][:100]}", flush=True)
        if args.out is not None:
            write_atomically(args.out, document)


if __name__ == "__main__":
    main()
