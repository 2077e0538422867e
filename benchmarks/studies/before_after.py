"""Compares two versions of the package on the same cases: ``python -m benchmarks.studies.before_after --before DIR``.

A version is a checkout with its extension built. One process cannot load both, so each case is timed against a plain
torch reference in the same process, processes of the two versions alternate, and their ratios are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F

Pair = tuple[Callable[[], object], Callable[[], object]]
SWEEP = [(1, 64, 256), (64, 64, 256), (256, 256, 256), (256, 512, 1024), (1024, 256, 256)]
SCHEDULES = ("sequential", "joint")
MODELS = {
    "small, B S = 2 x 32, D = 64, V = 256": {"d_model": 64, "vocab_size": 256, "batch": 2, "seq_len": 32},
    "default run, B S = 4 x 256, D = 192, V = 4096": {"d_model": 192, "vocab_size": 4096, "batch": 4, "seq_len": 256},
}


def cases() -> Iterator[tuple[str, Pair]]:
    """Yields names and functions, each with its reference: eager torch, the bare GEMMs, or the autograd schedule."""
    import mtp_ext

    def loss_pair(n: int, width: int, vocab: int) -> Pair:
        hidden = torch.randn(n, width, requires_grad=True)
        weight, targets = torch.randn(vocab, width, requires_grad=True), torch.randint(vocab, (n,))

        def eager() -> object:
            return torch.autograd.grad(F.cross_entropy(F.linear(hidden, weight), targets), (hidden, weight))

        return lambda: torch.autograd.grad(
            mtp_ext.linear_cross_entropy(hidden, weight, targets), (hidden, weight)
        ), eager

    for n, width, vocab in SWEEP:
        yield f"loss, N = {n}, D = {width}, V = {vocab}, against eager", loss_pair(n, width, vocab)
    ours, _ = loss_pair(1024, 512, 32_000)
    yield "loss, N = 1024, D = 512, V = 32000, against its GEMMs", (ours, bare_gemms(1024, 512, 32_000))
    for name, shape in MODELS.items():
        yield f"heads alone, linear, {name}, sequential against autograd", heads_pair(**shape)
        for schedule in SCHEDULES:
            yield f"step, {name}, {schedule} against autograd", step_pair(schedule, **shape)


def bare_gemms(n: int, width: int, vocab: int, rows: int = 512) -> Callable[[], object]:
    """Returns a function that computes the three GEMMs of the loss, chunk by chunk."""
    hidden, weight = torch.randn(n, width), torch.randn(vocab, width)
    logits, grad, total = torch.empty(rows, vocab), torch.empty(rows, width), torch.zeros(vocab, width)

    def run() -> object:
        for chunk in torch.split(hidden, rows):
            torch.mm(chunk, weight.t(), out=logits)
            torch.mm(logits, weight, out=grad)
            torch.addmm(total, logits.t(), chunk, out=total)
        return total

    return run


def step_pair(schedule: str, d_model: int, vocab_size: int, batch: int, seq_len: int) -> Pair:
    """Returns a training step of a model with four parallel heads and two trunk layers, and its reference."""
    from mtp_ext.nn import MTPConfig, MTPModel

    model = MTPModel(MTPConfig(vocab_size, d_model, n_layers=6, n_attn_heads=2, n_future=4, max_seq_len=seq_len))
    labels = torch.randint(vocab_size, (batch, seq_len + 4))

    def step(schedule: str) -> Callable[[], object]:
        return lambda: model(labels[:, :seq_len], labels, schedule=schedule).loss.backward()

    return step(schedule), step("autograd")


def heads_pair(d_model: int, vocab_size: int, batch: int, seq_len: int) -> Pair:
    """Four linear heads on given hidden states: little but the loss."""
    from mtp_ext.nn import MTPConfig, MTPModel

    config = MTPConfig(vocab_size, d_model, n_layers=1, n_attn_heads=2, n_future=4, variant="linear")
    heads = MTPModel(config).heads
    hidden = torch.randn(batch, seq_len, d_model, requires_grad=True)
    labels = torch.randint(vocab_size, (batch, seq_len + 4))

    def step(schedule: str) -> Callable[[], object]:
        return lambda: heads(hidden, labels, schedule=schedule).loss.backward()

    return step("sequential"), step("autograd")


def measure(seconds: float) -> dict[str, list[float]]:
    """Measures milliseconds of each case and its ratio to the reference: medians of interleaved calls."""
    found = {}
    for name, pair in cases():
        times: tuple[list[float], list[float]] = ([], [])
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or len(times[0]) < 4:
            for function, taken in zip(pair, times, strict=True):
                start = time.perf_counter()
                function()
                taken.append(1e3 * (time.perf_counter() - start))
        ours, yardstick = (taken[len(taken) // 10 + 1 :] for taken in times)  # without the warm-up calls
        found[name] = [median(ours), median(a / b for a, b in zip(ours, yardstick, strict=True))]
    return found


def child(package: Path, seconds: float) -> dict[str, list[float]]:
    """Runs :func:`measure` with the package of a checkout."""
    here = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-m", "benchmarks.studies.before_after", "--child", "--seconds", str(seconds)]
    environment = os.environ | {"PYTHONPATH": f"{package.resolve() / 'python'}{os.pathsep}{here}"}
    done = subprocess.run(command, env=environment, cwd=here, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, list[float]] = json.loads(done.stdout.splitlines()[-1])
    return found


def compare(before: Path, after: Path, rounds: int, seconds: float) -> list[dict[str, Any]]:
    """Returns one row per case: medians over the rounds of both versions."""
    runs: dict[str, list[dict[str, list[float]]]] = {"before": [], "after": []}
    for i in range(rounds):
        for version, package in sorted({"before": before, "after": after}.items(), reverse=i % 2 == 0):
            runs[version].append(child(package, seconds))
    rows = []
    for name in runs["before"][0]:
        row: dict[str, Any] = {"case": name}
        for version, found in runs.items():
            row[f"{version}_ms"], row[f"{version}_ratio"] = (median(run[name][i] for run in found) for i in (0, 1))
            row[f"{version}_ratios"] = [run[name][1] for run in found]
        rows.append(row)
        print(f"{name}: {row['before_ratio']:.3f} -> {row['after_ratio']:.3f} of the yardstick", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--before", type=Path)
    parser.add_argument("--after", type=Path, default=Path(__file__).resolve().parents[2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each case in each process")
    parser.add_argument("--out", type=Path, help="the JSON file to write")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.child:
        print(json.dumps(measure(args.seconds)))
        return
    rows = compare(args.before, args.after, args.rounds, args.seconds)
    if args.out is not None:
        # Imported here, because a child with another version of the package cannot import them.
        from benchmarks.harness.machine import describe
        from benchmarks.harness.runner import write_atomically

        write_atomically(args.out, {"env": describe("cpu"), "rows": rows})


if __name__ == "__main__":
    main()
