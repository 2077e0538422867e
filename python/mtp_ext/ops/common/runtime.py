"""What torch's runtime asks of an operation: autocast, DTensors, debug checks."""

from __future__ import annotations

import sys

import torch
from torch import Tensor

_debug_checks = False


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The autocast dtype of ``x``'s device, or None where autocast is off or leaves ``x`` (float64) alone."""
    device = x.device.type
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def is_dtensor(x: object) -> bool:
    """Whether ``x`` is a :class:`torch.distributed.tensor.DTensor`.

    Does not import them: that takes 0.6 s, and torch may be built without. Whoever has one has imported the module.
    """
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def debug_checks(enabled: bool) -> bool:
    """Switches checks that synchronise with a GPU on or off, for this process.

    On a GPU a target that is no class makes the loss NaN, because looking would stall the stream. With debug checks the
    loss looks, and raises ``ValueError`` with the target and its index. On the CPU it always does.

    Args:
        enabled: Whether to check from now on.
    Returns:
        The previous setting.

    Example:
        >>> before = debug_checks(True)
        >>> debug_checks(before)
        True
    """
    global _debug_checks
    previous, _debug_checks = _debug_checks, bool(enabled)
    return previous


def debug_checks_enabled() -> bool:
    """The current setting."""
    return _debug_checks
