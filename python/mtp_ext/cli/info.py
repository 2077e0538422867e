"""``mtp info``: shows the build, the hardware, and missing features with how to get them."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

import mtp_ext
from mtp_ext.cli.architectures import TABLE_WIDTH, architecture_table, read_shape
from mtp_ext.train.device import native_bfloat16


@dataclass(frozen=True)
class InfoCommand:
    """Show how mtp_ext was built, what this machine offers and what is missing, or the cost of a model."""

    config: Path | None = None
    """A TOML file of training options, or the directory of a checkpoint or a run: show the parameters and FLOPs of its
    model instead, next to those of the other architectures of the same shape."""


def run(arguments: Sequence[str]) -> int:
    """Runs the command; returns the exit code."""
    command = tyro.cli(InfoCommand, args=list(arguments), prog="mtp info")
    console = Console()
    if command.config is not None:
        # Wider than a narrow terminal, because truncated cells would be useless.
        Console(width=max(console.width, TABLE_WIDTH)).print(architecture_table(*read_shape(command.config)))
        return 0
    for title, rows in sections().items():
        table = Table.grid(padding=(0, 2))
        for label, value in rows:
            table.add_row(f"  {label}", Text(value))
        console.print(Text(title, style="bold"))
        console.print(table)
    return 0


def sections() -> dict[str, list[tuple[str, str]]]:
    """Returns labels and values by section."""
    built = {key: str(value) for key, value in mtp_ext.build_info().items()}
    versions = [
        ("mtp_ext", mtp_ext.__version__),
        ("python", platform.python_version()),
        ("torch", torch.__version__),
    ]
    return {
        "Versions": versions,
        "Build": list(built.items()),
        "CPU": _cpu(),
        "GPU": _gpus(),
        "Missing": missing() or [("nothing", "all parts are here")],
    }


def missing() -> list[tuple[str, str]]:
    """Returns the features that this installation lacks, and how to get them."""
    found = []
    built_with_cuda = bool(mtp_ext.build_info().get("cuda"))
    rebuild = "pip install --no-build-isolation --force-reinstall --no-deps ."
    if torch.version.cuda is None:
        found.append(("GPU training", "this torch is built without CUDA; install a CUDA build of torch (pytorch.org)"))
    elif not torch.cuda.is_available():
        found.append(("GPU training", "torch has CUDA but sees no GPU; check the driver with nvidia-smi"))
    if torch.version.cuda is not None and not built_with_cuda:
        needs = "" if shutil.which("nvcc") else f"install the CUDA toolkit {torch.version.cuda} (nvcc), then "
        found.append(("GPU kernels", f"this build has none; {needs}MTP_EXT_CUDA=1 {rebuild}"))
    if not native_bfloat16(torch.device("cpu")):
        found.append(("bfloat16 on the CPU", "this processor has no bfloat16 instructions; training uses float32 here"))
    return found


def _cpu() -> list[tuple[str, str]]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    bfloat16 = "native" if native_bfloat16(torch.device("cpu")) else "emulated"
    return [
        ("instructions", torch.backends.cpu.get_cpu_capability()),
        ("bfloat16", bfloat16),
        ("cores", f"{cores} ({torch.get_num_threads()} torch threads)"),
    ]


def _gpus() -> list[tuple[str, str]]:
    if not torch.cuda.is_available():
        return [("none", "")]
    found = []
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        found.append(
            (
                f"cuda:{index}",
                f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, compute capability {gpu.major}.{gpu.minor}",
            )
        )
    return found
