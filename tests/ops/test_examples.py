"""The examples in the docstrings of the public functions run, and print what they say."""

from __future__ import annotations

import doctest
import importlib
from types import ModuleType

import pytest

import mtp_ext

PUBLIC = ("linear_cross_entropy", "multi_token_cross_entropy", "count_targets", "debug_checks", "release_workspace")


def module_of(name: str) -> ModuleType:
    return importlib.import_module(getattr(mtp_ext, name).__module__)


@pytest.mark.parametrize("name", PUBLIC)
def test_examples(name: str) -> None:
    result = doctest.testmod(module_of(name))
    assert result.attempted > 0 and result.failed == 0
