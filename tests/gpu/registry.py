"""The checks that need a GPU: plain functions, so that they run with and without pytest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


class CannotRun(Exception):
    """This machine has not what the check needs; the message says what."""


@dataclass(frozen=True)
class Check:
    """One check; ``small`` ones are few and short enough for compute-sanitizer."""

    name: str
    run: Callable[[torch.device], None]
    small: bool


CHECKS: list[Check] = []


def check(*, small: bool = False) -> Callable[[Callable[[torch.device], None]], Callable[[torch.device], None]]:
    """Registers a function of a device. It raises where something is wrong."""

    def register(function: Callable[[torch.device], None]) -> Callable[[torch.device], None]:
        CHECKS.append(Check(function.__name__, function, small))
        return function

    return register


def all_checks() -> list[Check]:
    """Every check, in the order of the files."""
    from tests.gpu import group_checks, kernel_checks, loss_checks, model_checks, runtime_checks  # noqa: F401  (they register)

    return list(CHECKS)
