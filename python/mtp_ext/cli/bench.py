"""``mtp bench``: times a part of the package on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import tyro

from mtp_ext.cli.bench_decode import DecodeBench
from mtp_ext.cli.bench_loss import LossBench


def run(arguments: Sequence[str]) -> int:
    """Runs the command; returns the exit code."""
    commands = (
        Annotated[LossBench, tyro.conf.subcommand("loss", prefix_name=False)]
        | Annotated[DecodeBench, tyro.conf.subcommand("decode", prefix_name=False)]
    )
    command: LossBench | DecodeBench = tyro.cli(commands, args=list(arguments), prog="mtp bench")
    return command.run()
