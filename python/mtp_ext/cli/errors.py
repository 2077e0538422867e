"""Exit codes and one-line error messages."""

from __future__ import annotations

FAILED, USAGE, INTERRUPTED = 1, 2, 130
FOLLOWED = 3  # ended because another process failed first, which says why


def explain(error: Exception) -> str:
    """Formats an error in one line: its message, prefixed with its type if that is needed to understand it."""
    message = " ".join(str(error).split())
    if isinstance(error, (ValueError, RuntimeError, NotImplementedError)) and message:
        return message
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return f"{type(error).__name__}: {message} (pass --debug to see where)"
