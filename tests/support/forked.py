"""Processes for tests, from a fork server that has imported what they need.

A start takes milliseconds, not the seconds that importing torch takes in each. A process begins without threads, and
its high-water mark of resident memory (``VmHWM``) is its own.
"""

from __future__ import annotations

import multiprocessing
import os
import re
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch.multiprocessing as mp

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["mtp_ext.cli.train", "pytest", "torch._dynamo", "torch._functorch.aot_autograd", "torch.distributed.fsdp"]
)


def call(function: Callable[..., Any], *arguments: Any) -> Any:
    """The result of ``function``, which a module has to hold, in a process of its own."""
    with ProcessPoolExecutor(max_workers=1, mp_context=CONTEXT) as pool:
        return pool.submit(function, *arguments).result()


def run_code(code: str, directory: Path) -> None:
    """Runs a program in ``directory``, in a process of its own; raises what it raises."""
    call(_execute, code, directory)


def _execute(code: str, directory: Path) -> None:
    os.chdir(directory)
    exec(compile(code, "<document>", "exec"), {"__name__": "__main__"})


def call_ranks(function: Callable[..., None], world_size: int, *arguments: Any) -> None:
    """Runs ``function(rank, *arguments)`` in a process for each rank; raises what one of them raises."""
    mp.start_processes(function, args=arguments, nprocs=world_size, start_method="forkserver")  # type: ignore[no-untyped-call]


def peak_bytes() -> int:
    """The most resident memory that this process had so far; Linux only."""
    found = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])
