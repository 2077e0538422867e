"""Errors as people read them."""

from __future__ import annotations

FAILED, USAGE, INTERRUPTED = 1, 2, 130


def explain(error: Exception) -> str:
    """One line for an error: its own message, or its type where it has none that stands alone."""
    message = " ".join(str(error).split())
    if isinstance(error, (ValueError, RuntimeError, NotImplementedError)) and message:
        return message
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return f"{type(error).__name__}: {message} (pass --debug to see where)"
