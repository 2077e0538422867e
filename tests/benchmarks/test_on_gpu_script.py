"""benchmarks/on_gpu.sh without a GPU: a stand-in for Python shows the order, the files, the cut-offs and the status."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "on_gpu.sh"
STAGES = [
    "build",
    "smoke",
    "row_pass",
    "gpu_loss",
    "gpu_profile",
    "checks",
    "gpu_heads",
    "step_memory",
    "checks_late",
    "memcheck",
    "racecheck",
    "synccheck",
    "gpu_peers",
]

# Answers for torch, has a setuptools without the module `packaging`, and writes what a stage is asked to write.
PYTHON = """#!/usr/bin/env bash
case "$*" in
  *get_device_capability*) echo 9.0; exit "${FAKE_NO_DEVICE:-0}" ;;
  *import\\ setuptools,\\ packaging*) exit "${FAKE_PACKAGING_STATUS:-1}" ;;
  *_vendor*) mkdir -p "$FAKE_PACKAGING"; echo "$FAKE_PACKAGING"; exit ;;
esac
echo "ran $* for arch $TORCH_CUDA_ARCH_LIST"
echo "toolkit $CUDA_HOME"
[ "${FAKE_PACKAGING_STATUS:-1}" = 0 ] || ls "$(cut -d: -f3 <<<"$PYTHONPATH")/packaging" >/dev/null || exit 4
case "$*" in
  *"${FAKE_FAILS:-nothing}"*) exit 3 ;;
  *"${FAKE_HANGS:-nothing}"*) sleep 60 ;;
esac
while [ $# -gt 1 ]; do
  [ "$1" = --out ] && echo '{}' >"$2"
  shift
done
exit 0
"""
SANITIZER = """#!/usr/bin/env bash
shift 6
exec "$@"
"""


def run(tmp_path: Path, **settings: str) -> tuple[int, str, Path]:
    for name, text in {"python": PYTHON, "compute-sanitizer": SANITIZER}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    out = tmp_path / "out"
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": str(tmp_path / "python")}
    env |= {"OUT": str(out), "FAKE_PACKAGING": str(tmp_path / "vendored"), "TMPDIR": str(tmp_path), **settings}
    done = subprocess.run(["bash", str(SCRIPT)], env=env, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout, out


def ends(log: str) -> dict[str, str]:
    """How every stage ended, from the summary."""
    lines = log.split("== in short\n")[1].splitlines()
    return dict(line.split(": ", 1) for line in lines)


def test_everything_runs_in_order_and_leaves_few_plain_files(tmp_path: Path) -> None:
    status, shown, out = run(tmp_path)
    log = (out / "log.txt").read_text()
    assert status == 0, log
    assert list(ends(log)) == STAGES and all(end.startswith("passed") for end in ends(log).values())
    assert [log.index(f"\n== {name}, ") for name in STAGES] == sorted(log.index(f"\n== {name}, ") for name in STAGES)
    assert "ran setup.py build_ext --inplace for arch 9.0" in log and "synccheck: passed" in shown
    files = sorted(path.name for path in out.iterdir())
    results = {*STAGES} - {"build", "memcheck", "racecheck", "synccheck"}
    assert files == sorted({"log.txt"} | {f"{name}.json" for name in results})
    assert not any(path.is_symlink() for path in out.rglob("*"))
    assert not list(tmp_path.glob("tmp.*")), "the scratch folder stays behind"


@pytest.mark.parametrize(("fails", "ended"), [("parts early --out", "checks"), ("row_pass", "row_pass")])
def test_a_failing_stage_does_not_end_the_run_but_shows_in_the_status(tmp_path: Path, fails: str, ended: str) -> None:
    status, _, out = run(tmp_path, FAKE_FAILS=fails)
    found = ends((out / "log.txt").read_text())
    assert status == 1 and list(found) == STAGES
    assert found[ended].startswith("exit 3") and found["step_memory"].startswith("passed")


def test_without_a_build_nothing_else_runs(tmp_path: Path) -> None:
    status, shown, out = run(tmp_path, FAKE_FAILS="build_ext")
    assert status == 1 and "build: exit 3" in shown and "checks" not in (out / "log.txt").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(("hangs", "status"), [("racecheck", 0), ("parts late", 1)])
def test_a_stage_that_hangs_is_cut_off_and_the_rest_is_named(tmp_path: Path, hangs: str, status: int) -> None:
    got, _, out = run(tmp_path, FAKE_HANGS=hangs, MTP_ON_GPU_SECONDS="7")
    found = ends((out / "log.txt").read_text())
    assert got == status  # a benchmark without time is no failure; checks that did not end are
    assert next(end for end in found.values() if not end.startswith("passed")).startswith("cut off")
    assert found["gpu_peers"] == "no time left" and list(found) == STAGES


def test_torchs_part_of_packaging_is_not_put_before_a_whole_one(tmp_path: Path) -> None:
    """setuptools from 71 on brings the module and needs all of it: with torch's in front, the build failed."""
    status, _, _ = run(tmp_path, FAKE_PACKAGING_STATUS="0")
    assert status == 0 and not (tmp_path / "vendored").exists()


def test_the_toolkit_is_found_behind_a_wrapper_script(tmp_path: Path) -> None:
    """torch took the folder above the script's for the toolkit, and the build found no header of CUDA's."""
    (tmp_path / "toolkit" / "include").mkdir(parents=True)
    (tmp_path / "nvcc").write_text(f"#!/bin/sh\necho '#$ TOP={tmp_path}/toolkit' >&2\n")
    (tmp_path / "nvcc").chmod(0o755)
    _, _, out = run(tmp_path, CUDA_HOME="")
    assert f"\ntoolkit {tmp_path}/toolkit\n" in (out / "log.txt").read_text()
    _, _, out = run(tmp_path, CUDA_HOME="/somewhere")
    assert "\ntoolkit /somewhere\n" in (out / "log.txt").read_text()


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    status, shown, out = run(tmp_path, FAKE_NO_DEVICE="1")
    assert status == 1 and "no CUDA device that torch can use" in shown
    assert "no CUDA device" in (out / "log.txt").read_text()
