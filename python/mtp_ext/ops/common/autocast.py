"""What autocast asks of the loss: the dtype that its GEMM operands are rounded to."""

from __future__ import annotations

import torch
from torch import Tensor


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The autocast dtype of ``x``'s device, or None where autocast is off or leaves ``x`` (float64) alone."""
    device = x.device.type
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)
