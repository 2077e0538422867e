"""Loops in the machine code of a kernel: issue slots, wide accesses, loads under way before the first use."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,5})\*/\s+(.*?);")
_TARGET = re.compile(r"\bBRA\b.*?0x([0-9a-f]+)")
_LOAD = re.compile(r"LDG\.E\S*\.128\S* R(\d+)")


@dataclass(frozen=True)
class Instruction:
    """One instruction at its address."""

    address: int
    text: str

    @property
    def guarded(self) -> bool:
        """True if a predicate decides whether it is executed."""
        return self.text.startswith("@")

    @property
    def operation(self) -> str:
        """The name with its modifiers, such as ``LDG.E.128``."""
        return re.sub(r"^@!?U?P\w+ ", "", self.text).split()[0]

    @property
    def target(self) -> int | None:
        """The address that a branch leads to."""
        found = _TARGET.search(self.text)
        return int(found[1], 16) if found else None


@dataclass(frozen=True)
class Loop:
    """An innermost loop, from its head to its branch back."""

    body: Sequence[Instruction]

    def count(self, pattern: str) -> int:
        """Counts the instructions whose operation matches."""
        return sum(bool(re.match(pattern, x.operation)) for x in self.body)

    @cached_property
    def slots(self) -> int:
        """Issue slots of one pass on the longest way through the loop."""
        return longest_path(self.body)

    @cached_property
    def kind(self) -> str:
        """What a loop over a row does with its vectors: fill a cache, sum exponentials, write a gradient, or scan."""
        exponentials = self.count(r"MUFU\.EX2") > 0
        if self.count(r"STS.*128") and self.count(r"LDG.*128"):
            return "fill"
        if exponentials and self.count(r"STG.*128"):
            return "gradient"
        if exponentials and self.count(r"LDS.*128"):
            return "sum"
        return "scan" if exponentials and self.count(r"LDG.*128") else "other"

    def vectors(self, loads_per_vector: int) -> float:
        """Vectors of 16 bytes that one pass processes; a scan loads ``loads_per_vector`` for each, tables included."""
        if self.kind == "scan":
            return self.count(r"LDG.*128") / loads_per_vector
        return max(self.count(f"{access}.*128") for access in _ACCESS[self.kind])

    @cached_property
    def loads_under_way(self) -> int:
        """128-bit global loads before the first instruction that reads one of them."""
        written = set[int]()
        for instruction in self.body:
            load = _LOAD.search(instruction.text)
            operands = re.findall(r"\bR(\d+)", instruction.text)
            if written.intersection(map(int, operands if load is None else operands[1:])):
                break
            if load is not None:
                written.update(range(int(load[1]), int(load[1]) + 4))
        return len(written) // 4


_ACCESS = {"fill": ("STS",), "sum": ("LDS",), "gradient": ("STG",), "other": ("STG", "STS", "LDS", "LDG")}


def instructions_of(sass: str) -> list[Instruction]:
    """Reads a listing of cuobjdump."""
    return [Instruction(int(address, 16), text.strip()) for address, text in _INSTRUCTION.findall(sass)]


def loops_of(code: Sequence[Instruction]) -> list[Loop]:
    """The innermost loops, in the order of the code."""
    back = [(x.target, x.address) for x in code if x.target is not None and x.target < x.address]
    inner = [a for a in back if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in back)]
    return [Loop([x for x in code if low <= x.address <= high]) for low, high in sorted(inner)]


def longest_path(body: Sequence[Instruction]) -> int:
    """Instructions on the longest way from the first to the last, along forward branches."""
    place = {x.address: i for i, x in enumerate(body)}
    longest = [0] * (len(body) + 1)
    for i in range(len(body) - 1, -1, -1):
        here = body[i]
        ways = [] if here.operation.startswith("BRA") and not here.guarded else [longest[i + 1]]
        if here.target is not None and here.target > here.address and here.target in place:
            ways.append(longest[place[here.target]])
        longest[i] = 1 + max(ways, default=0)
    return longest[0]


def fence_after_stores(code: Sequence[Instruction]) -> bool:
    """True if a memory barrier follows the last wide global store of a loop that writes a gradient."""
    stores = [
        x.address for loop in loops_of(code) if loop.kind == "gradient" for x in loop.body if "STG" in x.operation
    ]
    return bool(stores) and any(x.operation.startswith("MEMBAR") and x.address > max(stores) for x in code)
