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


def assert_close(actual: torch.Tensor, exact: torch.Tensor, eager: torch.Tensor, floor: float, what: str) -> None:
    """Our error is at most twice that of eager torch in the same dtype, plus ``floor`` of the largest exact value."""
    scale = float(exact.abs().max()) if exact.numel() else 0.0
    worst = float((actual.double().cpu() - exact.cpu()).abs().max()) if exact.numel() else 0.0
    allowed = floor * (scale + 1e-30)
    if eager.numel():
        allowed += 2 * float((eager.double().cpu() - exact.cpu()).abs().max())
    assert worst <= allowed, f"{what}: off by {worst:.3g}, allowed {allowed:.3g}, largest {scale:.3g}"
