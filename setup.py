"""Builds mtp_ext._C from csrc/; a directory is its own source list.

Environment: MTP_EXT_CUDA=auto|1|0, TORCH_CUDA_ARCH_LIST (else cmake/default_archs.txt), CUDA_HOME, CXX, MAX_JOBS.
"""

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

from setuptools import setup

try:
    import pybind11
    import torch
    from packaging.version import Version
    from torch.utils import cpp_extension
except ImportError as error:
    need = "`pip install 'torch>=2.11' setuptools ninja packaging pybind11`, then `pip install --no-build-isolation .`"
    raise SystemExit(
        f"mtp_ext: the build needs the module '{error.name}', which is not installed here: {need}"
    ) from None

ROOT = Path(__file__).resolve().parent
TORCH = Version(torch.__version__)


def check_toolchain() -> None:
    """Exits with a one-line message if torch is too old or the compiler lacks the C++ standard that torch requires."""
    if TORCH.release < (2, 11):
        raise SystemExit(f"mtp_ext: torch {TORCH} is too old: `pip install 'torch>=2.11'`")
    cxx = shlex.split(cpp_extension.get_cxx_compiler())
    if shutil.which(cxx[0]) is None:
        raise SystemExit(f"mtp_ext: no C++ compiler '{cxx[0]}': install g++ (`apt install g++`), or set CXX to one")
    std = "c++20" if TORCH.release >= (2, 13) else "c++17"
    probe = [*cxx, f"-std={std}", "-fsyntax-only", "-x", "c++", "-"]
    if subprocess.run(probe, input=b"#include <optional>", capture_output=True).returncode != 0:
        raise SystemExit(f"mtp_ext: '{cxx[0]}' cannot compile {std}: install g++ 11 or newer, or set CXX to one")


def want_cuda() -> bool:
    """Resolves MTP_EXT_CUDA; an explicit CUDA build that is not possible is an error, never a CPU build."""
    mode = os.environ.get("MTP_EXT_CUDA", "auto")
    if mode not in ("auto", "1", "0"):
        raise SystemExit(f"mtp_ext: MTP_EXT_CUDA must be auto, 1 or 0, not '{mode}'")
    home = cpp_extension.CUDA_HOME  # None for a CPU build of torch, even with a toolkit installed
    nvcc = shutil.which("nvcc", path=f"{home}/bin" if home else None)
    missing = [] if torch.version.cuda else [f"a CUDA build of torch (torch {TORCH} has none)"]
    missing += [] if nvcc else ["nvcc (install the CUDA toolkit, or set CUDA_HOME to it)"]
    if mode == "1" and missing:
        raise SystemExit(f"mtp_ext: MTP_EXT_CUDA=1 needs {' and '.join(missing)}")
    if mode == "0" or missing:
        return False
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    found = re.findall(r"release (\d+)", version) or ["unknown"]
    if found[0] != torch.version.cuda.split(".")[0]:
        fix = f"install a CUDA {torch.version.cuda} toolkit and set CUDA_HOME to it, or set MTP_EXT_CUDA=0"
        raise SystemExit(f"mtp_ext: nvcc is of CUDA {found[0]}, torch {TORCH} of {torch.version.cuda}: {fix}")
    return True


check_toolchain()
os.chdir(ROOT)  # setuptools requires relative sources
CUDA = want_cuda()
os.environ.setdefault("MAX_JOBS", str(max(2, os.cpu_count() or 2)))
os.environ.setdefault("TORCH_CUDA_ARCH_LIST", Path("cmake/default_archs.txt").read_text().strip())
patterns = ["ops/*.cpp", "cpu/*.cpp"] + ["kernels/*.cu"] * CUDA
sources = [str(p) for q in patterns for p in sorted(Path("csrc").glob(q)) if CUDA or not p.stem.endswith("_cuda")]
# The stable ABI's floor is torch 2.10, encoded as in torch/csrc/stable/version.h.
defines = ["-DTORCH_TARGET_VERSION=0x020a000000000000"] + ["-DMTP_WITH_CUDA"] * CUDA
flags = {"cxx": ["-O3", "-g0", "-fvisibility=hidden", f"-fmacro-prefix-map={ROOT}=.", *defines]}
flags["nvcc"] = ["-O3", "-lineinfo", *defines]
extension = cpp_extension.CUDAExtension if CUDA else cpp_extension.CppExtension
includes = [str(ROOT / "csrc"), pybind11.get_include()]
module = extension("mtp_ext._C", sources, include_dirs=includes, extra_compile_args=flags)
setup(package_dir={"": "python"}, ext_modules=[module], cmdclass={"build_ext": cpp_extension.BuildExtension})
