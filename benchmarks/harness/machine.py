"""Describes the environment of a measurement: the ``env`` block of every benchmark file."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import nvml

ROOT = Path(__file__).resolve().parents[2]


def describe(device: str) -> dict[str, Any]:
    """Returns the machine, software and command of a measurement on ``device`` ("cpu" or "cuda")."""
    from mtp_ext import _C

    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(["python", "-m", _module_name(), *sys.argv[1:]]),
        **source(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "build": _C.build_info(),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "gpu": gpu_state() if device == "cuda" else None,
    }


def gpu_state() -> dict[str, Any]:
    """Returns name, memory, driver and NVML readings of the current CUDA device; ``note`` says why NVML is missing."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    state: dict[str, Any] = {"name": properties.name, "memory_bytes": properties.total_memory, "driver": None}
    try:
        device = nvml.Device()
    except nvml.UnavailableError as reason:
        return state | {"note": str(reason)}
    reading: dict[str, Any] = device.read()
    throttle = nvml.reasons(reading.pop("throttle_bits"))
    return state | reading | {"driver": device.driver, "throttle_reasons": throttle}


def source() -> dict[str, Any]:
    """Returns the commit and whether the tree differs from it; None if unknown.

    The environment variables ``MTP_COMMIT`` and ``MTP_DIRTY`` ("0": no) take precedence, for copies without .git.
    """
    commit = os.environ.get("MTP_COMMIT")
    if commit:
        dirty = os.environ.get("MTP_DIRTY")
        return {"commit": commit, "dirty": dirty != "0" if dirty else None}
    changes = _git("status", "--porcelain", "--untracked-files=no")
    return {"commit": _git("rev-parse", "HEAD"), "dirty": None if changes is None else changes != ""}


def _module_name() -> str:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name if spec is not None else Path(sys.argv[0]).stem


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
