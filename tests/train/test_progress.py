"""The learning rate is a function of the progress alone."""

from __future__ import annotations

import math

import pytest

from mtp_ext.train.progress import Limits, Progress, learning_rate_factor


def test_warmup_is_linear_and_starts_above_zero() -> None:
    factors = [learning_rate_factor(step, 0.0, warmup_steps=4, decay_ratio=0.1) for step in range(6)]
    assert factors == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_no_warmup_starts_at_the_peak() -> None:
    assert learning_rate_factor(0, 0.0, warmup_steps=0, decay_ratio=0.1) == 1.0


@pytest.mark.parametrize(
    ("fraction", "cosine", "linear"),
    [(0.0, 1.0, 1.0), (0.25, 0.1 + 0.9 * (2 + math.sqrt(2)) / 4, 0.775), (0.5, 0.55, 0.55), (1.0, 0.1, 0.1)],
)
def test_decay_reaches_its_ratio_at_the_end(fraction: float, cosine: float, linear: float) -> None:
    options = {"warmup_steps": 1, "decay_ratio": 0.1}
    assert learning_rate_factor(99, fraction, **options) == pytest.approx(cosine, abs=1e-15)  # type: ignore[arg-type]
    linear_factor = learning_rate_factor(99, fraction, decay="linear", **options)  # type: ignore[arg-type]
    assert linear_factor == pytest.approx(linear, abs=1e-15)


def test_warmup_multiplies_the_decay() -> None:
    assert learning_rate_factor(0, 0.5, warmup_steps=2, decay_ratio=0.0) == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("limits", "fraction"),
    [
        (Limits(max_steps=40), 0.25),
        (Limits(max_tokens=2000), 0.5),
        (Limits(max_seconds=40.0), 0.75),
        (Limits(max_steps=40, max_seconds=40.0, max_tokens=2000), 0.75),
        (Limits(max_steps=5), 1.0),
    ],
)
def test_the_first_limit_decides(limits: Limits, fraction: float) -> None:
    assert Progress(step=10, tokens=1000, seconds=30.0).fraction(limits) == fraction


def test_progress_survives_its_state() -> None:
    progress = Progress(step=3, tokens=96, seconds=1.5)
    assert Progress(**progress.state_dict()) == progress  # type: ignore[arg-type]
