"""The loss as processors with fewer instructions run it: every row kernel and GEMM path, on any machine that has them.

``MTP_EXT_CPU_CAPABILITY`` lowers what this package uses, ``ATEN_CPU_CAPABILITY`` and ``ONEDNN_MAX_CPU_ISA`` what torch
and oneDNN use; all three are read once, at the first use in a process.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mtp_ext import _C
from mtp_ext.ops.common.backend import has_fast_bfloat16_gemm
from mtp_ext.train.device import native_bfloat16

pytestmark = pytest.mark.slow
LEVELS = ("plain", "avx2", "avx512")
ENVIRONMENTS = {
    "plain": {"MTP_EXT_CPU_CAPABILITY": "plain", "ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"},
    "avx2": {"MTP_EXT_CPU_CAPABILITY": "avx2", "ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
}
TESTS = ("test_awkward_sizes.py", "test_properties.py", "test_processors.py::test_the_level_is_the_one_asked_for")


def test_the_level_is_the_one_asked_for() -> None:
    asked = os.environ.get("MTP_EXT_CPU_CAPABILITY")
    assert asked is None or _C.build_info()["cpu_capability"] in LEVELS[: LEVELS.index(asked) + 1]
    cpu = torch.device("cpu")
    assert native_bfloat16(cpu) == has_fast_bfloat16_gemm()  # the trainer and the loss choose alike
    assert asked in (None, "avx512") or not native_bfloat16(cpu)


@pytest.mark.parametrize("level", ENVIRONMENTS)
def test_the_loss_on_lesser_processors(level: str) -> None:
    best = _C.build_info()["cpu_capability"]
    if LEVELS.index(level) >= LEVELS.index(best):
        pytest.skip(
            f"the best that this processor or MTP_EXT_CPU_CAPABILITY offers is {best}: every other test runs it"
        )
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(str(here / name) for name in TESTS)],
        env=os.environ | ENVIRONMENTS[level],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
