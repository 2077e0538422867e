"""``mtp <command>``: finds the command and turns its errors into one sentence and an exit code."""

from __future__ import annotations

import importlib
import logging
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from mtp_ext.cli.errors import FAILED, INTERRUPTED, USAGE, explain


@dataclass(frozen=True)
class Command:
    """A command: what it does, and the module whose ``run(arguments)`` does it and returns the exit code."""

    summary: str
    module: str


COMMANDS = {
    "train": Command("train a multi-token prediction model", "mtp_ext.cli.train"),
    "generate": Command("continue a text with a trained model", "mtp_ext.cli.generate"),
    "evaluate": Command("measure a trained model on held-out text", "mtp_ext.cli.evaluate"),
    "bench": Command("time the fused loss against plain torch", "mtp_ext.cli.bench"),
    "info": Command("show how mtp_ext was built and what this machine offers", "mtp_ext.cli.info"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        arguments: Without the program's name; default those of the process.
    Returns:
        The exit code: 0; 1 where the work failed; 2 where the call was wrong; 128 + the signal where it was stopped.
    """
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
    except KeyboardInterrupt:
        print("mtp: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output went away, as `mtp generate | head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except Exception as error:
        if debug:
            raise
        print(f"mtp {given[0]}: {explain(error)}", file=sys.stderr)
        return USAGE if isinstance(error, (TypeError, ValueError)) else FAILED


def usage() -> str:
    """The commands, one a line."""
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
