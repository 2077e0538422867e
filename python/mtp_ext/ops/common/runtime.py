"""Runtime state of an operation: autocast, DTensors, debug checks."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import torch
from torch import Tensor

_Function = TypeVar("_Function", bound=Callable[..., object])

_debug_checks = False


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Returns the autocast dtype for ``x``'s device, or None if autocast is off or ``x`` is float64."""
    device = x.device.type
    if x.dtype == torch.float64 or not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Disables autocast on a device; does nothing for one that has none (meta)."""
    return torch.autocast(device.type, enabled=False) if torch.amp.is_autocast_available(device.type) else nullcontext()


def outside_graphs(function: _Function) -> _Function:
    """Excludes a function from the graphs of torch.compile, because native calls in it write to their arguments."""
    disabled: _Function = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
    return disabled


def is_dtensor(x: object) -> bool:
    """Returns True if ``x`` is a :class:`torch.distributed.tensor.DTensor`.

    Does not import the module, which takes 0.6 s and may be missing from torch: it is loaded if a DTensor exists.
    """
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def debug_checks(enabled: bool) -> bool:
    """Enables or disables checks that synchronise with the GPU, for this process.

    On a GPU an out-of-range target or normalizer makes the loss NaN, because checking would stall the stream. With
    debug checks the loss raises ``ValueError`` that names it, as it always does on the CPU.

    Args:
        enabled: The new setting.
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
    """Returns the current setting."""
    return _debug_checks
