"""Marks as slow what starts a process, which imports torch, for every block or command of the documents."""

from __future__ import annotations

import pytest

SLOW = {"test_python_blocks_run", "test_commands_exist", "test_the_code_of_architecture_runs"}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if getattr(item, "originalname", None) in SLOW:
            item.add_marker(pytest.mark.slow)
