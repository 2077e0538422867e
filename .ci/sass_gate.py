"""What the compiler made of the CUDA kernels, checked without a GPU.

Every ``csrc/kernels/*.cu`` compiles for every architecture, warnings and spills being errors. For the architectures of
``.ci/sass_table.txt`` the machine code of each kernel must have no stack frame and no local memory, at most the
registers that its row of the table allows, and the 128-bit global accesses that the row names. A kernel without a row
fails.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

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


@dataclass(frozen=True)
class Kernel:
    """One kernel of one cubin."""

    name: str
    registers: int
    stack: int
    sass: str


def read_table(text: str) -> list[Rule]:
    """Rows are ``pattern | registers per architecture | wide accesses``; the first row names the architectures."""
    rows = [[cell.strip() for cell in line.split("|")] for line in text.splitlines() if line and line[0] != "#"]
    architectures = rows[0][1].split()
    return [
        Rule(
            re.compile(pattern), dict(zip(architectures, map(int, ceilings.split()), strict=True)), tuple(wide.split())
        )
        for pattern, ceilings, wide in rows[1:]
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
    sources = [ROOT / name for name in sys.argv[1:]] or sorted((ROOT / "csrc" / "kernels").glob("*.cu"))
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
                for problem in problems(kernel, architecture, rules):
                    failed += 1
                    print(f"{source.name}, sm_{architecture}, {kernel.name}: {problem}")
    print(
        f"SASS gate: {len(sources)} files for sm_{', sm_'.join(ARCHITECTURES)}; {checked} kernels read, {failed} faults"
    )
    return 1 if failed or not checked else 0


if __name__ == "__main__":
    sys.exit(main())
