"""Memory for what a call of the loss writes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from mtp_ext import _C

# The largest workspace that outlives its call: a default chunk of logits at V = 128k.
KEPT_BYTES = 256 << 20
_kept: list[Tensor] = []


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """``torch.empty``, on huge pages where it is large and the host has them (see ``csrc/cpu/huge_pages.h``)."""
    x = torch.empty(shape, dtype=dtype, device=device)
    if device.type == "cpu" and x.nbytes >= _C.HUGE_PAGE_BYTES:
        _C.advise_huge_pages(x.data_ptr(), x.nbytes)
    return x


def take_workspace(numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Scratch memory for at least ``numel`` elements, flat: on the CPU that of the call before, if it is large enough.

    torch caches freed memory on a GPU and not on a CPU, where touching 128 MiB of fresh pages costs 10 ms, and up to 80
    where a hypervisor has to find them; the loss would pay that in every step.
    """
    fits = device.type == "cpu" and bool(_kept) and _kept[-1].dtype == dtype and _kept[-1].numel() >= numel
    return _kept.pop() if fits else empty((numel,), dtype, device)


def keep_workspace(buffer: Tensor) -> None:
    """Hands memory back for the next call; one block in all is kept, whatever the number of threads.

    Memory of an inference mode is not: a later call could not write to it.
    """
    if buffer.is_cpu and buffer.nbytes <= KEPT_BYTES and not buffer.is_inference():
        _kept[:] = [buffer]


@contextmanager
def workspace(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Iterator[Tensor]:
    """Scratch memory of ``shape``, kept for the next call unless this one fails."""
    numel = math.prod(shape)
    buffer = take_workspace(numel, dtype, device)
    yield buffer[:numel].view(shape)
    keep_workspace(buffer)


def release_workspace() -> None:
    """Frees the memory that the loss keeps between calls on the CPU: one chunk of logits, at most 256 MiB.

    The next call takes it anew. (On a GPU it is torch's caching allocator that keeps it: ``torch.cuda.empty_cache()``.)

    Example:
        >>> release_workspace()
    """
    _kept.clear()
