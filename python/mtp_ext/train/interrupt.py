"""Turns Ctrl-C, SIGTERM and SIGHUP into a request to stop after the current step."""

from __future__ import annotations

import os
import signal
import threading
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any

HANGUP: signal.Signals | None = getattr(signal, "SIGHUP", None)  # absent on Windows
SIGNALS = (signal.SIGINT, signal.SIGTERM, *([HANGUP] if HANGUP else []))


class StopRequest:
    """A context in which the first signal sets `received`, and a second one has its default effect.

    A further SIGHUP is ignored, because kernel and shell both send one when a terminal closes. A process that ignores
    SIGHUP (nohup) keeps ignoring it.

    Args:
        announce: Whether to say on standard error what happens next.
    Attributes:
        received: The signal that requested the stop, or ``None``.
    """

    def __init__(self, *, announce: bool = True) -> None:
        self._announce = announce
        self.received: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # only the main thread may set handlers
            handled = [n for n in SIGNALS if n != HANGUP or signal.getsignal(n) != signal.SIG_IGN]
            self._previous = {number: signal.signal(number, self._handle) for number in handled}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore(*self._previous)

    def _restore(self, *numbers: signal.Signals) -> None:
        for number in numbers:
            signal.signal(number, self._previous.pop(number))

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            return
        self.received = signal.Signals(number)
        self._restore(*(n for n in self._previous if n != HANGUP))
        if not self._announce:
            return
        message = f"\n{self.received.name}: finishing this step and writing a checkpoint (once more to quit at once)\n"
        with suppress(OSError):  # the terminal may be gone
            os.write(2, message.encode())  # print is not reentrant: the signal may have interrupted one
