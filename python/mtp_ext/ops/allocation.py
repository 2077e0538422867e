"""Memory for what a call of the loss writes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mtp_ext import _C

# Smaller blocks are the allocator's to recycle; at this size every call maps, and faults in, fresh pages.
HUGE_PAGE_BYTES = 4 << 20


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """``torch.empty``, on huge pages where it is large and the host has them (see ``csrc/cpu/huge_pages.h``)."""
    x = torch.empty(shape, dtype=dtype, device=device)
    if device.type == "cpu" and x.nbytes >= HUGE_PAGE_BYTES:
        _C.advise_huge_pages(x.data_ptr(), x.nbytes)
    return x
