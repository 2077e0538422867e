"""Starts the processes of ``mtp train --nproc``, passes signals on and ends them together."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

from mtp_ext.cli.errors import FOLLOWED
from mtp_ext.train.interrupt import SIGNALS
from mtp_ext.train.report.display import complain

GRACE_SECONDS = 30.0


def launch(arguments: Sequence[str], n_processes: int) -> int:
    """Runs ``mtp train`` in processes on this machine, as torchrun would.

    A signal goes to the main process, with which the others agree to stop. When one fails, the others get 30 seconds to
    notice.

    Args:
        arguments: Those of ``mtp train``.
        n_processes: The number of processes.
    Returns:
        0, the exit code of a process that failed of itself, or 128 + the signal that ended one.
    """
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    threads = str(max(1, (os.cpu_count() or 1) // n_processes))
    common = {
        **{"OMP_NUM_THREADS": threads, **os.environ},
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"},
        **{"WORLD_SIZE": str(n_processes), "LOCAL_WORLD_SIZE": str(n_processes)},
    }
    command = [sys.executable, "-m", "mtp_ext", "train", *arguments]
    # In a session of their own: Ctrl-C in a terminal goes to all processes of a session, here to this one alone.
    processes = [
        subprocess.Popen(command, env={**common, "RANK": str(i), "LOCAL_RANK": str(i)}, start_new_session=True)
        for i in range(n_processes)
    ]
    previous = {number: signal.signal(number, lambda n, _: processes[0].send_signal(n)) for number in SIGNALS}
    try:
        return _wait(processes)
    finally:
        for process in processes:
            process.kill()
        for number, handler in previous.items():
            signal.signal(number, handler)


def _wait(processes: Sequence[subprocess.Popen[bytes]]) -> int:
    """Waits until all have ended, or the grace after the first failure is over; returns the exit code."""
    deadline = math.inf
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
        failed = [(rank, code) for rank, process in enumerate(processes) if (code := process.poll())]
        if failed and deadline == math.inf:
            deadline = time.monotonic() + GRACE_SECONDS
            rank, code = failed[0]
            if code < 0:
                name = signal.Signals(-code).name
                complain(f"mtp train: process {rank} of {len(processes)} was killed by {name}; the others end as well")
        time.sleep(0.05)
    codes = sorted((process.poll() or 0 for process in processes), key=lambda code: (code == 0, code == FOLLOWED))
    return 128 - codes[0] if codes[0] < 0 else codes[0]
