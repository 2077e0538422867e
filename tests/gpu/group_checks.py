"""A vocabulary in shards: the stages of the row kernels, and a process group of this process alone."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

import mtp_ext
from mtp_ext.ops.common.result import RowTables
from mtp_ext.ops.loss.arguments import LossCall
from mtp_ext.ops.loss.loop.vocabulary_shard import combined
from mtp_ext.ops.loss.options import RowOptions
from mtp_ext.ops.loss.row_kernels import ROW_STATISTICS, RowScales, RowShard, loss_rows_
from tests.gpu.registry import CannotRun, check

OPTIONS = (RowOptions(), RowOptions(label_smoothing=0.1, z_loss=1e-2, softcap=5.0, logit_scale=1.5))


def call_of(logits: Tensor, options: RowOptions) -> LossCall:
    """A row of logits for each target."""
    labels = torch.randint(logits.shape[1], (1, len(logits)), device=logits.device)
    return LossCall(labels, len(logits), 1, 0, torch.float32, options)


def padded(logits: Tensor) -> Tensor:
    """A copy whose rows start at multiples of 16 bytes, as kernels need them."""
    return torch.nn.functional.pad(logits, (0, -logits.shape[1] % 8))[:, : logits.shape[1]]


def whole_rows(logits: Tensor, call: LossCall) -> tuple[Tensor, RowTables]:
    """The gradient of logits ``[R, V]``, and the tables."""
    rows, grad = torch.arange(len(logits), device=logits.device), padded(logits)
    tables = RowTables.zeros(1, 1, len(rows), dtype=torch.float32, device=logits.device)
    loss_rows_(grad, rows, call, scales_of(call), tables, write_gradient=True)
    return grad, tables


def scales_of(call: LossCall) -> RowScales:
    class_weights = call.options.class_weights
    assert class_weights is not None
    return RowScales(torch.ones(1, device=class_weights.device), class_weight_sum=float(class_weights.sum()))


def sharded_rows(logits: Tensor, call: LossCall, sizes: list[int]) -> tuple[Tensor, RowTables]:
    """The same from shards of ``sizes`` classes, one after the other."""
    n_rows, device, scales = len(logits), logits.device, scales_of(call)
    rows = torch.arange(n_rows, device=device)
    tables = RowTables.zeros(1, 1, n_rows, dtype=torch.float32, device=device)
    parts = [padded(part) for part in logits.split(sizes, 1)]
    assert call.options.class_weights is not None
    own = [
        replace(call, options=replace(call.options, class_weights=weights.contiguous()))
        for weights in call.options.class_weights.split(sizes)
    ]
    stages = [
        RowShard(
            sum(sizes[:i]),
            sum(sizes),
            torch.empty(n_rows, ROW_STATISTICS, dtype=torch.float64, device=device),
            torch.empty(n_rows, dtype=torch.float64, device=device),
        )
        for i in range(len(sizes))
    ]
    for stage in ("statistics", "gradient"):
        for part, mine, shard in zip(parts, own, stages, strict=True):
            loss_rows_(part, rows, mine, scales, tables, write_gradient=True, stage=stage, shard=shard)
        if stage == "statistics":
            statistics = combined(torch.stack([shard.statistics for shard in stages]))
            for shard in stages:
                shard.statistics.copy_(statistics)
    return torch.cat(parts, 1), tables


@check(small=True)
def the_stages_of_shards_equal_whole_rows(device: torch.device) -> None:
    for sizes, options in ((s, o) for s in ([500, 503], [1, 4097], [30_000, 20_000]) for o in OPTIONS):
        logits = 3 * torch.randn(19, sum(sizes), device=device)
        class_weights = torch.rand(sum(sizes), device=device) + 0.5
        call = call_of(logits, replace(options, class_weights=class_weights))
        whole, expected = whole_rows(logits, call)
        ours, found = sharded_rows(logits, call, sizes)
        torch.testing.assert_close(ours, whole, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close((found.loss, found.lse), (expected.loss, expected.lse), rtol=1e-5, atol=1e-5)
        assert torch.equal(found.predicted, expected.predicted)


@contextmanager
def group_of_one(device: torch.device) -> Iterator[dist.ProcessGroup]:
    backend = "nccl" if device.type == "cuda" else "gloo"
    if dist.is_initialized():
        raise CannotRun("a process group exists")
    if backend == "nccl" and not dist.is_nccl_available():
        raise CannotRun("torch has no NCCL here")
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(backend, init_method=f"file://{Path(folder) / 'store'}", rank=0, world_size=1)
        try:
            assert dist.group.WORLD is not None
            yield dist.group.WORLD
        finally:
            dist.destroy_process_group()


@check(part="late")
def a_group_of_one_equals_no_group(device: torch.device) -> None:
    """Results are equal, and only the first loss of a parameter synchronises with the host."""
    hidden = torch.randn(2, 2, 33, 64, device=device).requires_grad_()
    weight = torch.randn(1003, 64, device=device).requires_grad_()
    labels = torch.randint(1003, (2, 35), device=device)

    def run(group: dist.ProcessGroup | None) -> list[Tensor]:
        result = mtp_ext.multi_token_cross_entropy(
            hidden, weight, labels, group=group, chunk_rows=50, label_smoothing=0.1, z_loss=1e-3
        )
        return [*(x.detach() for x in result), *torch.autograd.grad(result.loss, (hidden, weight))]

    with group_of_one(device) as group:
        expected, first = run(None), run(group)
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        try:
            second = run(group)
        finally:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    for ours in (first, second):
        for x, y in zip(ours, expected, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
