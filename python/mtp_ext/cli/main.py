"""``mtp <command>``: runs a command and turns its errors into one line and an exit code."""

from __future__ import annotations

import importlib
import io
import logging
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from mtp_ext.cli.errors import FAILED, INTERRUPTED, USAGE, explain
from mtp_ext.train.report.display import complain, discard


@dataclass(frozen=True)
class Command:
    """A command: its summary, and the module whose ``run(arguments)`` runs it and returns the exit code."""

    summary: str
    module: str


COMMANDS = {
    "train": Command("train a multi-token prediction model", "mtp_ext.cli.train"),
    "generate": Command("continue a text with a trained model", "mtp_ext.cli.generate"),
    "evaluate": Command("measure a trained model on held-out text", "mtp_ext.cli.evaluate"),
    "bench": Command("time the fused loss, or decoding with drafts", "mtp_ext.cli.bench"),
    "plan": Command("plan the memory of a training step", "mtp_ext.cli.plan"),
    "info": Command("show how mtp_ext was built and what this machine offers", "mtp_ext.cli.info"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        arguments: Arguments without the program name; default those of the process.
    Returns:
        The exit code: 0, 1 for a failure, 2 for a usage error, or 128 + the signal that stopped it.
    """
    _open_standard_streams()
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    given = [argument for argument in given if argument != "--debug"]
    if not given or given[0] in ("-h", "--help"):
        print(usage())
        return 0 if given else USAGE
    if given[0] not in COMMANDS:
        print(f"mtp: unknown command {given[0]!r}; expected one of {', '.join(COMMANDS)}", file=sys.stderr)
        return USAGE
    logging.basicConfig(format="%(levelname)s: %(message)s")
    try:
        code: int = importlib.import_module(COMMANDS[given[0]].module).run(given[1:])
        sys.stdout.flush()
        return code
    except KeyboardInterrupt as error:
        complain(f"mtp: interrupted{f'; {error}' if error.args else ''}")
        return INTERRUPTED
    except BrokenPipeError:  # the reader closed the pipe, as in `mtp generate | head`
        discard(sys.stdout)
        return 128 + signal.SIGPIPE
    except Exception as error:
        if debug:
            raise
        complain(f"mtp {given[0]}: {explain(error)}")
        try:
            sys.stdout.flush()
        except OSError:
            discard(sys.stdout)
        return USAGE if isinstance(error, (TypeError, ValueError)) else FAILED


def _open_standard_streams() -> None:
    """Opens the null device for each closed standard stream, so that no file of a run gets its descriptor, and lets
    standard output escape what it cannot encode."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            if null != number:
                os.dup2(null, number)
                os.close(null)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))
    if isinstance(sys.stdout, io.TextIOWrapper):
        with suppress(OSError):  # its descriptor was exchanged
            sys.stdout.reconfigure(errors="backslashreplace")  # an ASCII terminal, a file name that is not UTF-8


def usage() -> str:
    """Returns the usage text with all commands."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: mtp <command> [options]",
            "",
            *lines,
            "",
            "mtp <command> --help lists a command's options; --debug shows where an error comes from.",
        ]
    )
