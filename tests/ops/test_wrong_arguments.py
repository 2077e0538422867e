"""Wrong arguments of the public functions, listed and drawn: TypeError or ValueError that names an argument."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.wrong_arguments import TARGETS, target_of

FUNCTIONS = sorted(TARGETS)


def check_refused(function: str, wrong: dict[str, Any]) -> None:
    target = target_of(function)
    with torch.random.fork_rng(), pytest.raises((TypeError, ValueError)) as error:
        target.call(**target.good | wrong)
    names = target.good.keys() | target.kinds.keys()
    assert re.search(rf"\b({'|'.join(names)})\b", str(error.value)), (wrong, error.value)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_good_arguments_are_taken(function: str) -> None:
    target_of(function).call(**target_of(function).good)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_every_wrong_value_is_refused(function: str) -> None:
    for name, value in target_of(function).wrong():
        check_refused(function, {name: value})


@given(st.data())
def test_several_wrong_arguments_are_refused(data: st.DataObject) -> None:
    """What one wrong argument lets another do before it is looked at."""
    function = data.draw(st.sampled_from(FUNCTIONS))
    draws = st.lists(st.sampled_from(target_of(function).wrong()), min_size=1, max_size=4)
    check_refused(function, dict(data.draw(draws)))
