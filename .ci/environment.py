"""Makes .venv, installs what the project needs and builds the extension; does nothing when all of that is up to date.

``make`` calls it before every command: ``python3 .ci/environment.py [extra ...]`` with extras of pyproject.toml.
A base interpreter that has torch >= 2.11 lends it to .venv; otherwise the torch of constraints.txt is installed.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STATE = VENV / "mtp_ext-state.json"
LOG = VENV / "setup.log"
CONSTRAINTS = VENV / "constraints.txt"
PIP = (PYTHON, "-m", "pip", "install", "--disable-pip-version-check", "-c", CONSTRAINTS)
BUILD_VARIABLES = ("MTP_EXT_CUDA", "TORCH_CUDA_ARCH_LIST", "CUDA_HOME", "CXX")


def stop(sentence: str) -> NoReturn:
    raise SystemExit(f"mtp_ext: {sentence}")


def digest(*parts: str | Path) -> str:
    """A key of texts and of files' names and contents."""
    sha = hashlib.sha256()
    for part in parts:
        sha.update(str(part).encode() + b"\0")
        if isinstance(part, Path):
            sha.update(part.read_bytes())
    return sha.hexdigest()


def base_torch() -> str | None:
    """The version of the base interpreter's torch when the project can use it."""
    try:
        version = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return None
    numbers = re.match(r"(\d+)\.(\d+)", version)
    return version if numbers and (int(numbers[1]), int(numbers[2])) >= (2, 11) else None


def check_machine() -> None:
    """Names what only the system's own package manager can add, before anything is downloaded."""
    minor = f"python3.{sys.version_info.minor}"
    missing = [name for name in ("venv", "ensurepip") if importlib.util.find_spec(name) is None]
    if missing:
        stop(f"{minor} has no module '{missing[0]}': install it (Debian: `apt install python3-venv`)")
    compiler = shlex.split(os.environ.get("CXX", "c++"))[0]
    if shutil.which(compiler) is None:
        stop(f"no C++ compiler '{compiler}': install g++ (Debian: `apt install g++`), or set CXX to a compiler")
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        stop(f"{minor} has no C headers (Python.h): install them (Debian: `apt install python3-dev`)")


def run(what: str, *command: str | Path) -> None:
    """Runs one step quietly; a failure prints the step's own sentence, or the end of its output, and the log's name."""
    print(f"{what} ...", flush=True)
    start = time.monotonic()
    with LOG.open("a+", encoding="utf-8", errors="replace") as log:
        begin = log.seek(0, os.SEEK_END)
        done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, cwd=ROOT)
        log.seek(begin)
        output = log.read()
    if done.returncode != 0:
        sentence = re.search(r"^\s*(mtp_ext: .*)$", output, re.MULTILINE)
        print(sentence[1] if sentence else "\n".join(output.splitlines()[-15:]), file=sys.stderr)
        stop(f"'{what}' failed; all of its output is in {LOG.relative_to(ROOT)}")
    print(f"  done in {time.monotonic() - start:.0f} s", flush=True)


def make_venv(torch: str | None) -> None:
    """An empty .venv; one that sees the base interpreter's packages when torch is among them."""
    print(f"Making .venv from Python {sys.version.split()[0]}" + (f" and its torch {torch}" if torch else ""))
    shutil.rmtree(VENV, ignore_errors=True)
    VENV.mkdir()
    run("Creating the environment", sys.executable, "-m", "venv", *["--system-site-packages"] * bool(torch), VENV)
    if torch and sys.prefix != sys.base_prefix:  # python3 is itself a venv's: its packages are not the system's
        site = subprocess.check_output(
            [PYTHON, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
        )
        Path(site.strip(), "base_environment.pth").write_text(sysconfig.get_path("purelib") + "\n")


def install(torch: str | None, extras: list[str]) -> None:
    """torch and the build tools first: the extension builds against what is installed, without isolation."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = (f"torch=={torch}" if torch and line.startswith("torch==") else line for line in lines)
    CONSTRAINTS.write_text("\n".join(pins) + "\n")
    run("Installing torch" if torch is None else f"Checking torch {torch}", *PIP, "torch")
    run("Installing the build tools", *PIP, "setuptools", "ninja", "packaging", "pybind11")
    target = f"{ROOT}[{','.join(extras)}]" if extras else str(ROOT)
    run("Building the extension, installing the rest", *PIP, "--no-build-isolation", "-e", target)


def main() -> None:
    check_machine()
    try:
        state = json.loads(STATE.read_text())
    except (OSError, ValueError):
        state = {}
    activated = Path(sys.prefix).resolve() == VENV.resolve()  # `make` was called from inside .venv
    if activated and "base" not in state:
        stop("the active .venv is not whole: run `deactivate`, then make again")
    torch = state["torch"] if activated else base_torch()
    base = state["base"] if activated else digest(sys.version, sys.prefix, torch or "")

    def record(**keys: object) -> None:
        state.update(keys)
        STATE.write_text(json.dumps(state))

    if state.get("base") != base or not PYTHON.exists():
        make_venv(torch)
        state.clear()
        record(base=base, torch=torch)

    extras = sorted({*sys.argv[1:], *state.get("extras", [])})
    packages = digest(ROOT / "pyproject.toml", ROOT / "constraints.txt")
    native = sorted(p for p in (ROOT / "csrc").rglob("*") if p.is_file())
    variables = [f"{name}={os.environ.get(name)}" for name in BUILD_VARIABLES]
    build = digest(ROOT / "setup.py", ROOT / "cmake" / "default_archs.txt", *native, *variables)
    built = (ROOT / "python" / "mtp_ext" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}").exists()

    if state.get("packages") != packages:
        install(torch, extras)
        record(packages=packages, extras=extras, build=build)
        return
    if state.get("build") != build or not built:
        run("Building the extension", PYTHON, "setup.py", "build_ext", "--inplace")
        record(build=build)
    if state.get("extras") != extras:  # of the package as it is installed: nothing is built again
        run(f"Installing what {', '.join(extras)} need", *PIP, f"mtp_ext[{','.join(extras)}]")
        record(extras=extras)


if __name__ == "__main__":
    main()
