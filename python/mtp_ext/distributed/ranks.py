"""This process among those that train together, and what they agree on over the CPU."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

_Value = TypeVar("_Value")


class Ranks:
    """A process of ``size``; by default the only one, for which everything here is the identity.

    Attributes:
        rank: This process's number, in ``[0, size)``.
        size: The number of processes.
        local_rank: Its number on its machine.
    """

    def __init__(self, rank: int = 0, size: int = 1, local_rank: int = 0, store: Any = None) -> None:
        self.rank, self.size, self.local_rank, self._store = rank, size, local_rank, store

    @property
    def is_main(self) -> bool:
        """True for the process that prints and writes."""
        return self.rank == 0

    def sum(self, x: Tensor) -> Tensor:
        """Returns the sum of a CPU tensor over the processes."""
        return self._reduced(x, "SUM")

    def maximum(self, value: int) -> int:
        """Returns the largest of the processes' numbers."""
        return int(self._reduced(torch.tensor(value), "MAX"))

    def from_main(self, make: Callable[[], _Value]) -> _Value:
        """Calls a function in the main process, and returns its picklable result in every process."""
        if self.size == 1:
            return make()
        import torch.distributed as dist

        values = [make() if self.is_main else None]
        dist.broadcast_object_list(values, src=0, device=torch.device("cpu"))
        return values[0]  # type: ignore[return-value]

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """A block that the other processes enter when the main one has left it."""
        if not self.is_main:
            self.maximum(0)
        yield
        if self.is_main:
            self.maximum(0)

    def fails_first(self) -> bool:
        """Returns True to the first process that asks: the one whose error ended the others."""
        try:
            return self._store is None or self._store.add("failures", 1) == 1
        except RuntimeError:  # the process that kept the count is gone
            return False

    def _reduced(self, x: Tensor, operation: str) -> Tensor:
        if self.size == 1:
            return x
        import torch.distributed as dist

        x = x.clone()
        dist.all_reduce(x, getattr(dist.ReduceOp, operation))
        return x


@contextmanager
def joined_ranks() -> Iterator[Ranks]:
    """Joins the processes that torchrun started; yields a single one if it did not start this.

    The process group reduces CPU tensors by gloo, and those of a GPU by NCCL.
    """
    environment = os.environ
    if "RANK" not in environment or int(environment.get("WORLD_SIZE", "1")) == 1:
        yield Ranks()
        return
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    store, rank, size = next(rendezvous("env://"))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=PrefixStore("group", store), rank=rank, world_size=size)
    yield Ranks(rank, size, int(environment.get("LOCAL_RANK", "0")), store)
    dist.destroy_process_group()  # not after an error: it could wait for processes that are gone
