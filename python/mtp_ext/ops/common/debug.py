"""The switch for checks that make the host wait for a device."""

from __future__ import annotations

_enabled = False


def debug_checks(enabled: bool) -> bool:
    """Switches the costly checks of this process on or off.

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
    global _enabled
    previous, _enabled = _enabled, bool(enabled)
    return previous


def debug_checks_enabled() -> bool:
    """The current setting."""
    return _enabled
