"""The gate on the kernels' machine code: each fault is reported, and every kernel file has its rows in the table."""

from __future__ import annotations

import importlib.util
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
TABLE = "kernel | 80 90a | wide accesses\nmtp::copy_kernel<.*> | 32 40 | load store\n"
SASS = "LDG.E.128 R4, [R2.64] ;\nSTG.E.128 [R2.64], R4 ;\n"


@pytest.fixture(scope="module")
def gate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("sass_gate", ROOT / ".ci" / "sass_gate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["sass_gate"] = module  # dataclasses look the module up
    spec.loader.exec_module(module)
    return module


def test_a_good_kernel_passes(gate: ModuleType) -> None:
    kernel = gate.Kernel("mtp::copy_kernel<float>", 40, 0, SASS)
    assert gate.problems(kernel, "90a", gate.read_table(TABLE)) == []


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"registers": 41}, "it uses 41 registers, 40 are allowed"),
        ({"stack": 8}, "it has a stack frame of 8 bytes"),
        ({"sass": SASS + "STL [R1], R4 ;\n"}, "it reads or writes local memory"),
        ({"sass": SASS.replace("LDG.E.128", "LDG.E.64")}, "it has no 128-bit global load"),
        ({"sass": SASS.replace("STG.E.128", "STG.E")}, "it has no 128-bit global store"),
        ({"name": "mtp::another_kernel"}, "no row of sass_table.txt matches it"),
    ],
)
def test_each_fault_is_reported(gate: ModuleType, change: dict[str, object], sentence: str) -> None:
    kernel = replace(gate.Kernel("mtp::copy_kernel<float>", 40, 0, SASS), **change)
    assert gate.problems(kernel, "90a", gate.read_table(TABLE)) == [sentence]


def test_the_table_knows_every_kernel_in_the_source(gate: ModuleType) -> None:
    rules = gate.read_table((ROOT / ".ci" / "sass_table.txt").read_text())
    text = "\n".join(p.read_text() for p in sorted((ROOT / "csrc" / "kernels").glob("*.cu*")))
    names = set(re.findall(r"\b(\w+_kernel)\s*\(\s*const __grid_constant__", text))
    assert names
    assert names == {match[1] for rule in rules if (match := re.match(r"mtp::(\w+)", rule.pattern.pattern))}
