"""Memory for the outputs of the losses."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mtp_ext import _C


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """``torch.empty``; large CPU tensors use huge pages if available (see ``csrc/cpu/huge_pages.h``)."""
    x = torch.empty(shape, dtype=dtype, device=device)
    if type(x) is Tensor and device.type == "cpu" and x.nbytes >= _C.HUGE_PAGE_BYTES:  # a fake one has no address
        _C.advise_huge_pages(x.data_ptr(), x.nbytes)
    return x


def release_workspace() -> None:
    """Frees the memory that the CPU loss keeps between calls: one chunk of logits, at most 256 MiB.

    The next call allocates it again. (On a GPU torch's caching allocator keeps it: ``torch.cuda.empty_cache()``.)

    Example:
        >>> release_workspace()
    """
    _C.release_workspace()
