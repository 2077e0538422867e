"""Plans a training step: its memory, from a run of the step itself on tensors without data."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mtp_ext.nn import MTPConfig, MTPModel
from mtp_ext.nn.schedules.dispatch import check_schedule
from mtp_ext.ops.common import checks
from mtp_ext.ops.common.backend import CpuBackend, use_backend
from mtp_ext.plan.live_bytes import LiveBytes
from mtp_ext.train.config import OptimConfig
from mtp_ext.train.data import Batch
from mtp_ext.train.device import Compute, choose_compute
from mtp_ext.train.metrics import memory_bytes
from mtp_ext.train.optim import Optimizers
from mtp_ext.train.step import backward

DTYPES, OPTIMIZERS = ("float32", "bfloat16"), ("adamw", "muon")
STEPS = 2  # the second has the optimiser's state and the loss's workspace from its start


class _CpuStep(CpuBackend):
    """The CPU in a training step, where it reads from the loss's gradient that it is 1; a fake one has no value."""

    def is_one(self, by: Tensor) -> bool:
        return True


@dataclass(frozen=True)
class PlanBytes:
    """Bytes alive when most are alive; the parts sum to ``peak``.

    Attributes:
        parameters: Parameters and buffers, float32.
        gradients: What becomes a parameter's ``.grad``, as far as it exists at the peak.
        optimizer: The optimiser's state.
        activations: What autograd saved for backward.
        logits: Tensors with the vocabulary as their last dimension: the chunk of the fused losses.
        workspace: Everything else, such as the operands of an operator and its result.
        peak: The sum.
    """

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    workspace: int
    peak: int


@dataclass(frozen=True)
class Plan:
    """What a training step needs.

    Attributes:
        bytes: The memory of its tensors by category. Not in it: see :func:`left_out`.
    """

    bytes: PlanBytes

    def fits(self, gib: float) -> bool:
        """Returns True if the tensors fit in ``gib`` GiB."""
        return self.bytes.peak <= gib * 2**30


def plan(
    config: MTPConfig,
    *,
    batch_size: int,
    seq_len: int,
    schedule: str = "sequential",
    dtype: str = "bfloat16",
    optimizer: str = "adamw",
    world_size: int = 1,
    device: torch.device | str | None = None,
) -> Plan:
    """Plans a training step as :func:`mtp_ext.train.step.train_step` takes it.

    The step runs on fake tensors: nothing of its size is allocated or computed.

    Args:
        config: The model.
        batch_size: ``B``, sequences per forward.
        seq_len: ``S``, tokens per sequence.
        schedule: ``"sequential"``, ``"joint"`` or ``"autograd"``.
        dtype: ``"bfloat16"`` (autocast) or ``"float32"``: of the matrix products; parameters are float32.
        optimizer: ``"adamw"`` or ``"muon"``.
        world_size: 1.
        device: ``"cpu"`` or ``"cuda"``; default a GPU if there is one.
    Raises:
        TypeError: A size is not an integer.
        ValueError: An argument that is not one of these, or sequences longer than the model's longest.
    """
    if not isinstance(config, MTPConfig):
        raise TypeError(f"config must be an MTPConfig, got {type(config).__name__}")
    for name, size in (("batch_size", batch_size), ("seq_len", seq_len), ("world_size", world_size)):
        checks.check_int(name, size)
        checks.check_positive_int(name, size)
    if seq_len > config.max_seq_len:
        raise ValueError(f"seq_len must be at most the model's max_seq_len = {config.max_seq_len}, got {seq_len}")
    if world_size != 1:
        raise ValueError(f"world_size must be 1, because layouts over several ranks are not planned, got {world_size}")
    check_schedule(schedule)
    for name, value, known in (("dtype", dtype, DTYPES), ("optimizer", optimizer, OPTIMIZERS)):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    compute = choose_compute("auto" if device is None else str(device), dtype)
    optim = OptimConfig(name=optimizer)  # type: ignore[arg-type]  # checked above
    return Plan(_step_bytes(config, batch_size, seq_len, schedule, optim, compute))


def _step_bytes(
    config: MTPConfig, batch_size: int, seq_len: int, schedule: str, optim: OptimConfig, compute: Compute
) -> PlanBytes:
    with FakeTensorMode() as fake, compute.device:  # not .to(): modules cannot move fake parameters
        model = MTPModel(config)
    on_cpu = compute.device.type == "cpu"
    with use_backend(_CpuStep()) if on_cpu else nullcontext(), fake, LiveBytes(config.vocab_size) as live:
        live.mark("parameters", [*model.parameters(), *model.buffers()])
        live.mark_unembedding([model.embed.weight, *model.unembed.parameters()])
        optimizers = Optimizers(model, optim)
        labels = torch.zeros(batch_size, seq_len + config.n_future, dtype=torch.int64)
        batch = Batch(labels[:, :seq_len], labels, torch.zeros_like(labels))
        counts, weights = [batch_size * seq_len] * config.n_future, [1.0] * config.n_future
        for _ in range(STEPS):
            with live.saving():
                backward(model, batch, compute, schedule, weights, counts)
            live.mark("gradients", (p.grad for p in model.parameters()))
            optimizers.clip_gradients()
            optimizers.step(1.0)
            live.mark("optimizer", optimizers.tensors())
    found = live.at_peak()
    parts = {field.name: found[field.name] for field in fields(PlanBytes) if field.name != "peak"}
    return PlanBytes(**parts, peak=found.total())


def left_out(device: torch.device) -> str:
    """Says in one line what of a process is not in a plan for ``device``, with sizes where they are known."""
    if device.type == "cpu":
        here = memory_bytes(device) / 2**20
        return f"the interpreter and its libraries (this process: {here:.0f} MiB), their workspaces, fragmentation"
    return "the CUDA context and loaded kernels, workspaces of cuBLAS, fragmentation of the allocator: see nvidia-smi"
