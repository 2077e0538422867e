"""``mtp bench loss``: times the fused loss against plain torch on this machine, at a given shape."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from mtp_ext.ops import multi_token_cross_entropy
from mtp_ext.ops import reference as plain
from mtp_ext.train.config import check_at_least
from mtp_ext.train.device import choose_compute


@dataclass(frozen=True)
class LossBench:
    """Time the multi-token loss, forward and backward, against plain torch with full logits.

    The implementations take turns in one process; times are medians. `python -m benchmarks.suites.<name>` of the source
    tree measures more: memory, peers, options, a sweep.
    """

    positions: int = 1024
    """B * S: positions of a batch."""
    d_model: int = 512
    """Width D of the hidden states."""
    vocab_size: int = 32_000
    """Classes V."""
    n_future: int = 4
    """Heads n."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Dtype of hidden states and unembedding."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ..., or auto: a GPU if there is one."""
    rounds: int = 3
    """Timed calls of each implementation, after one warm-up call."""
    skip_plain: bool = False
    """Skip plain torch, for example if its logits do not fit in memory."""
    json: bool = False
    """Print the numbers as JSON."""

    def __post_init__(self) -> None:
        check_at_least(1, "", self, "positions", "d_model", "vocab_size", "n_future", "rounds")

    def run(self) -> int:
        """Runs the benchmark; returns the exit code."""
        device = choose_compute(self.device).device
        measured = measure(self, device)
        if self.json:
            print(json.dumps({"shape": asdict(self), "device": str(device), "results": [asdict(m) for m in measured]}))
        else:
            Console().print(table(self, device, measured))
        return 0


@dataclass(frozen=True)
class Measurement:
    """One implementation's median time per call, and its FLOP rate counting the 6 N D V of any exact loss."""

    implementation: str
    milliseconds: float
    gflop_per_s: float


def measure(command: LossBench, device: torch.device) -> list[Measurement]:
    """Times the implementations in turn on the same inputs."""
    torch.manual_seed(0)
    shape, dtype = (command.n_future, 1, command.positions, command.d_model), getattr(torch, command.dtype)
    hidden = torch.randn(shape, device=device).to(dtype).requires_grad_()
    weight = (torch.randn(command.vocab_size, command.d_model, device=device) * 0.05).to(dtype).requires_grad_()
    labels = torch.randint(command.vocab_size, (1, command.positions + command.n_future), device=device)
    losses: dict[str, Callable[..., Any]] = {"mtp_ext": multi_token_cross_entropy}
    if not command.skip_plain:
        losses["plain torch"] = plain.multi_token_cross_entropy
    seconds: dict[str, list[float]] = {name: [] for name in losses}
    for _ in range(command.rounds + 1):
        for name, loss in losses.items():
            seconds[name].append(seconds_of(loss, hidden, weight, labels))
    operations = 6 * command.n_future * command.positions * command.d_model * command.vocab_size
    medians = {name: statistics.median(values[1:]) for name, values in seconds.items()}
    return [Measurement(name, 1e3 * s, operations / s / 1e9) for name, s in medians.items()]


def seconds_of(loss: Callable[..., Any], hidden: Tensor, weight: Tensor, labels: Tensor) -> float:
    """Times one forward and backward, synchronised with the GPU."""
    if hidden.is_cuda:
        torch.cuda.synchronize(hidden.device)
    start = time.perf_counter()
    torch.autograd.grad(loss(hidden, weight, labels).loss, (hidden, weight))
    if hidden.is_cuda:
        torch.cuda.synchronize(hidden.device)
    return time.perf_counter() - start


def table(command: LossBench, device: torch.device, measured: Sequence[Measurement]) -> Table:
    """Formats the measurements as a table."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    shape = f"n = {command.n_future}, B·S = {command.positions}, D = {command.d_model}, V = {command.vocab_size}"
    found = Table(title=f"loss and gradients: {shape}, {command.dtype}, {name}", title_justify="left")
    for heading in ("implementation", "ms", "GFLOP/s of 6NDV", "times as fast"):
        found.add_column(heading, justify="left" if heading == "implementation" else "right")
    slowest = max(m.milliseconds for m in measured)
    for m in measured:
        ratio = f"{slowest / m.milliseconds:.2f}"
        found.add_row(m.implementation, f"{m.milliseconds:,.2f}", f"{m.gflop_per_s:,.1f}", ratio)
    return found
