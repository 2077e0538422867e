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
TABLE = """\
kernel | 80 90a | wide accesses | budget
mtp::copy_kernel<.*> | 32 40 | load store | other=4 loads=2
mtp::loss_rows_kernel<.*> | 32 40 | | gradient=0.75
"""
# Two loads, two stores, and five other instructions, of which a pass skips one of two.
SASS = """
/*0000*/ LDG.E.128 R4, desc[UR4][R2.64] ;
/*0010*/ LDG.E.128 R8, desc[UR4][R2.64+0x10] ;
/*0020*/ @P1 BRA 0x50 ;
/*0030*/ FADD R4, R4, 1 ;
/*0040*/ BRA 0x60 ;
/*0050*/ FMUL R4, R4, R5 ;
/*0060*/ STG.E.128 desc[UR4][R2.64], R4 ;
/*0070*/ STG.E.128 desc[UR4][R2.64+0x10], R8 ;
/*0080*/ @!P0 BRA 0x0 ;
/*0090*/ EXIT ;
"""
GRADIENT = """
/*0000*/ LDS.128 R4, [R2] ;
/*0010*/ MUFU.EX2 R4, R4 ;
/*0020*/ STG.E.128 desc[UR4][R2.64], R4 ;
/*0030*/ @!P0 BRA 0x0 ;
/*0040*/ EXIT ;
"""


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
        ({"sass": SASS + "/*00a0*/ STL [R1], R4 ;\n"}, "it reads or writes local memory"),
        ({"sass": SASS.replace("STG.E.128", "STS.128")}, "it has no 128-bit global store"),
        ({"sass": SASS.replace("R8, desc", "R8, [R4], desc")}, "1 loads are under way before the first use, 2 are due"),
        (
            {"sass": SASS.replace("FADD R4, R4, 1", "FADD R4, R4, 1 ;\n/*0038*/ FADD R4, R4, 1")},
            "its loop other has 4.50",
        ),
        ({"name": "mtp::loss_rows_kernel<x>", "sass": SASS}, "it has no loop of the kind gradient"),
        (
            {"name": "mtp::loss_rows_kernel<x, (mtp::Logits)0>", "sass": GRADIENT + "/*0050*/ MEMBAR.ALL.GPU ;\n"},
            "a memory barrier follows the stores of its gradient",
        ),
        ({"name": "mtp::another_kernel"}, "no row of sass_table.txt matches it"),
    ],
)
def test_each_fault_is_reported(gate: ModuleType, change: dict[str, object], sentence: str) -> None:
    kernel = replace(gate.Kernel("mtp::copy_kernel<float>", 40, 0, SASS), **change)
    problems = gate.problems(kernel, "90a", gate.read_table(TABLE))
    assert problems and problems[0].startswith(sentence)


def test_slots_of_a_row_are_per_element(gate: ModuleType) -> None:
    kernel = gate.Kernel("mtp::loss_rows_kernel<__nv_bfloat16, (mtp::Logits)0>", 40, 0, GRADIENT)
    assert kernel.slots() == {"gradient": 4 / 8}
    assert replace(kernel, name="mtp::loss_rows_kernel<float, (mtp::Logits)0>").slots() == {"gradient": 4 / 4}


def test_the_longest_way_through_a_loop_is_counted(gate: ModuleType) -> None:
    """Of nine instructions every pass leaves out one: the branch around an addition, or the multiplication."""
    (loop,) = gate.loops_of(gate.instructions_of(SASS))
    assert (len(loop.body), loop.slots, loop.loads_under_way) == (9, 8, 2)


def test_the_table_knows_every_kernel_in_the_source(gate: ModuleType) -> None:
    rules = gate.read_table((ROOT / ".ci" / "sass_table.txt").read_text())
    text = "\n".join(p.read_text() for p in sorted((ROOT / "csrc" / "kernels").glob("*.cu*")))
    names = set(re.findall(r"\b(\w+_kernel)\s*\(\s*const __grid_constant__", text))
    assert names
    assert names == {match[1] for rule in rules if (match := re.match(r"mtp::(\w+)", rule.pattern.pattern))}
