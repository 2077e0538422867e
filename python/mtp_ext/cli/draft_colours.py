"""Text of a terminal, coloured by what decided each token: head 1, or head 1 agreeing with a draft."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from rich.color import ColorSystem
from rich.console import Console
from rich.style import Style

from mtp_ext.generate import DecodingStats

Write = Callable[[str], None]
COLOURS = ("green", "cyan", "blue", "magenta", "yellow", "red", "bright_green", "bright_cyan")


def wants_colour() -> bool:
    """Tells whether standard output is a terminal that shows colours; NO_COLOR and TERM=dumb turn them off."""
    console = Console()
    return sys.stdout.isatty() and console.color_system is not None and not console.no_color


class Painter:
    """Writes text in the colour of a draft; that of head 1 (position 0), and all text without colours, stays plain.

    Args:
        write: Called with the text.
        coloured: Whether to use colours.
    """

    def __init__(self, write: Write, *, coloured: bool) -> None:
        self._write, self._coloured = write, coloured
        self.position = 0

    def __call__(self, text: str) -> None:
        if self._coloured and self.position:
            style = Style(color=COLOURS[(self.position - 1) % len(COLOURS)])
            text = style.render(text, color_system=ColorSystem.STANDARD)
        self._write(text)

    def legend(self, n_draft: int) -> None:
        """Writes a line that explains the colours, if there are any."""
        if not (self._coloured and n_draft):
            return
        for self.position in range(n_draft + 1):
            self(f"draft {self.position}  " if self.position else "head 1  ")
        self._write("\n")


class RoundWriter:
    """Passes on the tokens of each round one by one, with their position: the last is head 1's own, 0, and those before
    it are its accepted drafts, 1, 2, ...

    Where the text ends within a round, its last token may be a draft too. That round waits for :meth:`close`.

    Args:
        write: Called with each token and its position.
        max_new_tokens: Tokens that end the text.
        eos_token: Token that ends the text.
    """

    def __init__(self, write: Callable[[int, int], None], max_new_tokens: int, eos_token: int) -> None:
        self._write, self._n_left, self._eos_token = write, max_new_tokens, eos_token
        self._n_accepted, self._last = 0, list[int]()

    def add(self, tokens: Sequence[int]) -> None:
        """Adds a round."""
        self._n_left -= len(tokens)
        if self._n_left <= 0 or tokens[-1] == self._eos_token:
            self._last = [*tokens]
        else:
            self._n_accepted += len(tokens) - 1
            self._pass_on(tokens, len(tokens) - 1)

    def close(self, stats: DecodingStats) -> None:
        """Passes on the last round; ``stats`` tells how many drafts it accepted."""
        self._pass_on(self._last, stats.n_accepted - self._n_accepted)

    def _pass_on(self, tokens: Sequence[int], n_drafts: int) -> None:
        for position, token in enumerate(tokens, start=1):
            self._write(token, position if position <= n_drafts else 0)
