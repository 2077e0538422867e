"""The checks that need a GPU: plain functions, so that they run with and without pytest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

PARTS = ("smoke", "early", "late")  # in the order in which they run


class CannotRun(Exception):
    """This machine has not what the check needs; the message says what."""


@dataclass(frozen=True)
class Check:
    """One check.

    Attributes:
        name: The function's name.
        run: Raises where something is wrong.
        small: One of the few that are short enough for compute-sanitizer.
        part: When it runs. "late" ones are long, or can hang: models, NCCL, compilation.
    """

    name: str
    run: Callable[[torch.device], None]
    small: bool
    part: str


CHECKS: list[Check] = []


def check(
    *, small: bool = False, part: str = "early"
) -> Callable[[Callable[[torch.device], None]], Callable[[torch.device], None]]:
    """Registers a function of a device. It raises where something is wrong."""
    assert part in PARTS

    def register(function: Callable[[torch.device], None]) -> Callable[[torch.device], None]:
        CHECKS.append(Check(function.__name__, function, small, part))
        return function

    return register


def all_checks() -> list[Check]:
    """Every check, part by part, in the order of the files."""
    from tests.gpu import (  # noqa: F401  (they register)
        group_checks,
        kernel_checks,
        loss_checks,
        model_checks,
        runtime_checks,
        smoke_checks,
    )

    return sorted(CHECKS, key=lambda check: PARTS.index(check.part))
