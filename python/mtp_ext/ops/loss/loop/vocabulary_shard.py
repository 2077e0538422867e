"""A vocabulary sharded over a process group: each rank holds some rows of the unembedding and all hidden rows.

Communication per chunk of rows, for any number of heads: one all-gather of six numbers per row and one all-reduce of
the hidden states' gradient. All ranks combine the gathered numbers in the same order, so the loss is bitwise the same.
(Megatron-LM, arXiv 1909.08053, section 3; here without storing the logits.)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from mtp_ext.ops.loss.row_kernels import ROW_STATISTICS, RowShard

# By weight and group name. Reading the sizes syncs with the GPU, so it is done once per parameter. The cache hits on
# all ranks or on none, because all use corresponding shards in the same order.
_known_sizes = WeakTensorKeyDictionary()


@dataclass(frozen=True)
class VocabularyShard:
    """This rank's classes ``[start, start + size)`` of ``total``."""

    group: dist.ProcessGroup
    start: int
    size: int
    total: int
    largest: int  # the group's largest shard; determines the chunk size, so that all ranks use the same chunks

    @staticmethod
    def of(weight: Tensor, group: dist.ProcessGroup) -> VocabularyShard:
        """Returns the shard of ``weight``, ``[V, D]`` or ``[n, V, D]``, in ``group``.

        Raises:
            ValueError: ``weight`` changed its number of classes since its first use with ``group``.
        """
        sizes, rank, own = _sizes(weight, group), dist.get_rank(group), weight.shape[-2]
        if sizes[rank] != own:
            raise ValueError(
                f"weight must keep the {sizes[rank]} classes of its first use with this group, got {own}: ranks with "
                "an unchanged shard would not notice. Use a new tensor for another vocabulary"
            )
        return VocabularyShard(group, sum(sizes[:rank]), own, sum(sizes), max(sizes))

    def stage(self, n_rows: int, device: torch.device) -> RowShard:
        """Allocates the statistics of a chunk."""
        return RowShard(
            self.start,
            self.total,
            torch.empty(n_rows, ROW_STATISTICS, dtype=torch.float64, device=device),
            torch.empty(n_rows, dtype=torch.float64, device=device),
        )

    def combine_(self, statistics: Tensor) -> None:
        """Replaces this shard's row statistics ``[C, 6]`` with those of the whole vocabulary."""
        shards = [torch.empty_like(statistics) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(shards, statistics, group=self.group)
        statistics.copy_(combined(torch.stack(shards)))

    def sum_(self, x: Tensor) -> Tensor:
        """All-reduces ``x`` in place."""
        dist.all_reduce(x, group=self.group)
        return x

    def sum_async_(self, x: Tensor) -> dist.Work:
        """Starts an all-reduce of ``x`` in place; the caller waits for it."""
        work: dist.Work = dist.all_reduce(x, group=self.group, async_op=True)
        return work


def combined(shards: Tensor) -> Tensor:
    """Combines the row statistics of all shards, ``[P, C, 6]`` in rank order, into ``[C, 6]`` (float64)."""
    statistics = torch.empty_like(shards[0])  # max, sum_others, target_logit, class weight, weighted sum, argmax
    maxima = shards[..., 0]
    top = maxima.amax(0)
    statistics[:, 0] = top
    statistics[:, 1] = (shards[..., 1] * torch.exp(maxima - top)).sum(0)
    statistics[:, 2:5] = shards[..., 2:5].sum(0)
    first = (maxima == top).to(torch.int8).argmax(0)  # ties go to the lowest class, as in one process
    statistics[:, 5] = shards[..., 5].gather(0, first[None])[0]
    return statistics


def _sizes(weight: Tensor, group: dist.ProcessGroup) -> list[int]:
    """The number of classes on each rank of ``group``: cached, or from one small all-gather."""
    known: dict[str, list[int]] = _known_sizes.setdefault(weight, {})  # type: ignore[no-untyped-call]
    sizes = known.get(group.group_name)
    if sizes is None or len(sizes) != dist.get_world_size(group):
        own = torch.tensor([weight.shape[-2]], dtype=torch.int64, device=weight.device)
        gathered = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
        dist.all_gather(gathered, own, group=group)
        sizes = known[group.group_name] = torch.cat(gathered).tolist()
    return sizes
