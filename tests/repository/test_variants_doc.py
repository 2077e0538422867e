"""The table of architectures in docs/guide/models.md is that of the code."""

from __future__ import annotations

import re
from pathlib import Path

from mtp_ext.nn.schedules.dispatch import SCHEDULES
from mtp_ext.nn.variants import VARIANTS

TEXT = (Path(__file__).parents[2] / "docs" / "guide" / "models.md").read_text()


def test_every_variant_is_in_the_table() -> None:
    assert re.findall(r"^\| `(\w+)` \|", TEXT, re.MULTILINE) == list(VARIANTS)


def test_every_schedule_is_in_the_table() -> None:
    assert re.findall(r'^\| `"(\w+)"`', TEXT, re.MULTILINE) == list(SCHEDULES)
