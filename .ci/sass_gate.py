"""What the compiler made of the CUDA kernels, checked without a GPU.

Every ``csrc/kernels/*.cu`` compiles for every architecture, warnings and spills being errors. For the architectures of
``.ci/sass_table.txt`` the machine code of each kernel must have no stack frame and no local memory, at most the
registers that its row of the table allows, the 128-bit global accesses that the row names, and no memory barrier after
the stores of a gradient. Its loops must keep to the row's budget of issue slots, on the longest way through them. A
kernel without a row fails. ``--write`` writes the prediction that follows (``gpu_prediction.py``).
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # the tests load this file by its path
import gpu_prediction
from sass_loops import Instruction, Loop, fence_after_stores, instructions_of, loops_of

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / ".ci" / "sass_table.txt"
ARCHITECTURES = ("80", "90a", "100a", "120")
# cpp_extension's definitions: a kernel that needs an implicit conversion must fail here too.
DEFINITIONS = ("HALF_OPERATORS", "HALF_CONVERSIONS", "BFLOAT16_CONVERSIONS", "HALF2_OPERATORS")
WIDE_ACCESS = {"load": re.compile(r"\bLDG\.E\S*\.128"), "store": re.compile(r"\bSTG\.E\S*\.128")}
LOCAL_ACCESS = re.compile(r"\b(LDL|STL)\b")


@dataclass(frozen=True)
class Rule:
    """One row of the table."""

    pattern: re.Pattern[str]  # of the demangled name
    registers: dict[str, int]  # architecture -> ceiling
    wide: tuple[str, ...]  # "load", "store"
    budget: dict[str, float]  # kind of a loop -> issue slots; "loads" -> 128-bit loads before the first use


@dataclass(frozen=True)
class Kernel:
    """One kernel of one cubin."""

    name: str
    registers: int
    stack: int
    sass: str

    @cached_property
    def code(self) -> list[Instruction]:
        """Its instructions, in the order of their addresses."""
        return instructions_of(self.sass)

    @cached_property
    def loops(self) -> list[Loop]:
        """Its innermost loops with 128-bit accesses to memory."""
        return [loop for loop in loops_of(self.code) if loop.count(r"(LDG|STG|LDS|STS).*128")]

    def slots(self) -> dict[str, float]:
        """Issue slots by kind of loop: per element of a row; of other kernels, per vector of 16 bytes.

        Of several loops of one kind the cheapest, which is the unrolled one: another does what is left over.
        """
        width = 4 if "<float" in self.name else 8
        tables = width // 2 if "(mtp::Logits)0" not in self.name else 0  # 128-bit loads of bias and class weights
        found = dict[str, float]()
        for loop in self.loops:
            if loop.kind == "other" and "loss_rows" in self.name:
                continue  # zeros for a row without a target
            per = loop.slots / loop.vectors(1 + tables) / (1 if loop.kind == "other" else width)
            found[loop.kind] = min(per, found.get(loop.kind, per))
        return found

    def loads_under_way(self) -> int:
        """128-bit loads of the loop that reads rows from global memory, before the first use of one."""
        return max((loop.loads_under_way for loop in self.loops if loop.kind in ("fill", "other")), default=0)


def read_table(text: str) -> list[Rule]:
    """Rows are ``pattern | registers per architecture | wide accesses | budget``; the first names the architectures."""
    rows = [[cell.strip() for cell in line.split("|")] for line in text.splitlines() if line and line[0] != "#"]
    architectures = rows[0][1].split()
    return [
        Rule(
            re.compile(pattern),
            dict(zip(architectures, map(int, ceilings.split()), strict=True)),
            tuple(wide.split()),
            {name: float(most) for name, most in (entry.split("=") for entry in budget.split())},
        )
        for pattern, ceilings, wide, budget in rows[1:]
    ]


def problems(kernel: Kernel, architecture: str, rules: list[Rule]) -> list[str]:
    """What is wrong with a kernel, in sentences."""
    rule = next((rule for rule in rules if rule.pattern.fullmatch(kernel.name)), None)
    if rule is None:
        return [f"no row of {TABLE.name} matches it"]
    found = []
    if kernel.stack:
        found.append(f"it has a stack frame of {kernel.stack} bytes")
    if LOCAL_ACCESS.search(kernel.sass):
        found.append("it reads or writes local memory")
    if kernel.registers > rule.registers[architecture]:
        found.append(f"it uses {kernel.registers} registers, {rule.registers[architecture]} are allowed")
    found += [f"it has no 128-bit global {kind}" for kind in rule.wide if not WIDE_ACCESS[kind].search(kernel.sass)]
    return found + over_budget(kernel, rule)


def over_budget(kernel: Kernel, rule: Rule) -> list[str]:
    """Which loops have too many issue slots, or too few loads under way."""
    found = []
    if fence_after_stores(kernel.code):
        found.append("a memory barrier follows the stores of its gradient")
    slots = kernel.slots()
    for kind, most in rule.budget.items():
        if kind == "loads":
            if kernel.loads_under_way() < most:
                found.append(f"{kernel.loads_under_way()} loads are under way before the first use, {most:g} are due")
        elif kind not in slots:
            found.append(f"it has no loop of the kind {kind}")
        elif slots[kind] > most:
            found.append(f"its loop {kind} has {slots[kind]:.2f} issue slots, {most:g} are allowed")
    return found


def compile_cubin(source: Path, architecture: str, to: Path) -> None:
    """Raises CalledProcessError, whose output is the compiler's."""
    command = ["nvcc", "-std=c++17", "-O3", f"-I{ROOT / 'csrc'}", "-Xptxas=--warn-on-spills", "--Werror=all-warnings"]
    command += ["-Xcompiler=-Wall,-Wextra", f"-gencode=arch=compute_{architecture},code=sm_{architecture}"]
    command += [f"-D__CUDA_NO_{name}__" for name in DEFINITIONS]
    subprocess.run([*command, "-cubin", "-o", to, source], check=True, capture_output=True, text=True)


def output(*command: str | Path, stdin: str | None = None) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, input=stdin).stdout


def kernels_of(cubin: Path) -> list[Kernel]:
    usage = dict(re.findall(r"Function (\S+):\n\s*(.+)", output("cuobjdump", "--dump-resource-usage", cubin)))
    sass = re.split(r"^\s*Function : (\S+)$", output("cuobjdump", "--dump-sass", cubin), flags=re.MULTILINE)
    listing = dict(zip(sass[1::2], sass[2::2], strict=True))
    # File-local names carry a hash of the file.
    names = output("c++filt", "-p", stdin="\n".join(listing)).replace("(anonymous namespace)::", "").splitlines()
    numbers = {symbol: dict(re.findall(r"(\w+):(\d+)", usage[symbol])) for symbol in listing}
    return [
        Kernel(name, int(numbers[symbol]["REG"]), int(numbers[symbol]["STACK"]), listing[symbol])
        for symbol, name in zip(listing, names, strict=True)
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sources", nargs="*", help="default: all of csrc/kernels")
    parser.add_argument("--write", action="store_true", help="write docs/results/gpu-prediction.md")
    arguments = parser.parse_args()
    sources = [ROOT / name for name in arguments.sources] or sorted((ROOT / "csrc" / "kernels").glob("*.cu"))
    read = list[Kernel]()
    rules = read_table(TABLE.read_text())
    jobs = [(source, architecture) for source in sources for architecture in ARCHITECTURES]
    failed = checked = 0
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", "2"))) as pool:
        cubins = [Path(folder, f"{source.stem}.{architecture}.cubin") for source, architecture in jobs]
        compiled = [pool.submit(compile_cubin, *job, cubin) for job, cubin in zip(jobs, cubins, strict=True)]
        for (source, architecture), cubin, done in zip(jobs, cubins, compiled, strict=True):
            try:
                done.result()
            except subprocess.CalledProcessError as error:
                failed += 1
                print(f"{source.name} does not compile for sm_{architecture}:\n{error.stdout}{error.stderr}")
                continue
            if architecture not in rules[0].registers:
                continue
            for kernel in kernels_of(cubin):
                checked += 1
                read += [kernel] if architecture == gpu_prediction.ARCHITECTURE else []
                for problem in problems(kernel, architecture, rules):
                    failed += 1
                    print(f"{source.name}, sm_{architecture}, {kernel.name}: {problem}")
    print(
        f"SASS gate: {len(sources)} files for sm_{', sm_'.join(ARCHITECTURES)}; {checked} kernels read, {failed} faults"
    )
    if arguments.write:
        gpu_prediction.write({kernel.name: (kernel.registers, kernel.slots()) for kernel in read})
    return 1 if failed or not checked else 0


if __name__ == "__main__":
    sys.exit(main())
