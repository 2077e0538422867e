"""The build's contract: its error sentences, its choice of sources, and what the built extension says of itself."""

from __future__ import annotations

import importlib.metadata
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import setuptools
import torch
from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parents[2]

Build = Callable[..., dict[str, Any]]


@pytest.fixture
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Build:
    """Runs setup.py up to its call of setuptools.setup, and returns the arguments of that call.

    It runs in this process with the real torch, from another directory; ``torch_version``, ``torch_cuda`` and
    ``cuda_home`` say what torch should claim, and the other arguments are environment variables (None: unset).
    """

    def run(
        torch_version: str = "2.13.0", torch_cuda: str | None = None, cuda_home: Path | None = None, **env: str | None
    ) -> dict[str, Any]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(torch, "__version__", torch_version)
        monkeypatch.setattr(torch.version, "cuda", torch_cuda)
        monkeypatch.setattr(cpp_extension, "CUDA_HOME", cuda_home and str(cuda_home))
        with mock.patch.dict(os.environ), mock.patch.object(setuptools, "setup") as setup:
            for name, value in {"MTP_EXT_CUDA": None, "TORCH_CUDA_ARCH_LIST": None, **env}.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value
            runpy.run_path(str(ROOT / "setup.py"))
            return {**setup.call_args.kwargs, "archs": os.environ["TORCH_CUDA_ARCH_LIST"]}

    return run


def refusal(build: Build, **arguments: Any) -> str:
    """The one sentence with which setup.py refuses to build."""
    with pytest.raises(SystemExit) as stopped:
        build(**arguments)
    text = str(stopped.value)
    assert text.startswith("mtp_ext: ") and "\n" not in text
    return text


def fake_toolkit(home: Path, release: str) -> Path:
    """A CUDA toolkit that is an nvcc that tells its version."""
    (home / "bin").mkdir(parents=True)
    nvcc = home / "bin" / "nvcc"
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.1'\n")
    nvcc.chmod(0o755)
    return home


def path_with_only_a_compiler(directory: Path) -> str:
    compiler = shutil.which("c++")
    assert compiler is not None
    directory.mkdir()
    (directory / "c++").symlink_to(compiler)
    return str(directory)


def test_a_cpu_build_takes_the_cpu_sources(build: Build) -> None:
    (module,) = build()["ext_modules"]
    assert module.name == "mtp_ext._C"
    expected = [p for part in ("ops", "cpu") for p in (ROOT / "csrc" / part).glob("*.cpp") if "_cuda" not in p.stem]
    assert sorted(module.sources) == sorted(str(p.relative_to(ROOT)) for p in expected)
    assert "-DMTP_WITH_CUDA" not in module.extra_compile_args["cxx"]


def test_a_cuda_build_takes_the_cuda_sources_too(build: Build, tmp_path: Path) -> None:
    home = fake_toolkit(tmp_path / "cuda", "13.0")
    arguments = build(torch_cuda="13.0", cuda_home=home)
    (module,) = arguments["ext_modules"]
    assert {str(p.relative_to(ROOT)) for p in (ROOT / "csrc").glob("kernels/*.cu")} <= set(module.sources)
    assert {str(p.relative_to(ROOT)) for p in (ROOT / "csrc").glob("ops/*_cuda.cpp")} <= set(module.sources)
    assert all("-DMTP_WITH_CUDA" in module.extra_compile_args[language] for language in ("cxx", "nvcc"))
    assert arguments["archs"] == (ROOT / "cmake" / "default_archs.txt").read_text().strip()
    assert build(torch_cuda="13.0", cuda_home=home, TORCH_CUDA_ARCH_LIST="9.0a")["archs"] == "9.0a"


@pytest.mark.parametrize("mode", ["yes", "", "2", "AUTO"])
def test_unknown_cuda_mode(build: Build, mode: str) -> None:
    assert refusal(build, MTP_EXT_CUDA=mode) == f"mtp_ext: MTP_EXT_CUDA must be auto, 1 or 0, not '{mode}'"


def test_cuda_asked_for_on_a_cpu_torch_names_both_missing_parts(build: Build, tmp_path: Path) -> None:
    text = refusal(build, MTP_EXT_CUDA="1", PATH=path_with_only_a_compiler(tmp_path / "bin"), CXX=None)
    assert (
        "MTP_EXT_CUDA=1 needs a CUDA build of torch (torch 2.13.0 has none) and nvcc (" in text and "CUDA_HOME" in text
    )


def test_cuda_asked_for_without_nvcc_names_only_nvcc(build: Build, tmp_path: Path) -> None:
    text = refusal(build, torch_cuda="13.0", cuda_home=tmp_path, MTP_EXT_CUDA="1")
    assert text.startswith("mtp_ext: MTP_EXT_CUDA=1 needs nvcc (")


def test_auto_without_nvcc_is_a_cpu_build(build: Build, tmp_path: Path) -> None:
    (module,) = build(torch_cuda="13.0", cuda_home=tmp_path, MTP_EXT_CUDA="auto")["ext_modules"]
    assert "-DMTP_WITH_CUDA" not in module.extra_compile_args["cxx"]


@pytest.mark.parametrize("mode", ["auto", "1"])
@pytest.mark.parametrize("release", ["12.8", "1.3", "130.0"])
def test_cuda_major_mismatch(build: Build, tmp_path: Path, mode: str, release: str) -> None:
    home = fake_toolkit(tmp_path / "cuda", release)
    text = refusal(build, torch_cuda="13.0", cuda_home=home, MTP_EXT_CUDA=mode)
    assert f"nvcc is of CUDA {release.split('.')[0]}, torch 2.13.0 of 13.0: install a CUDA 13.0 toolkit" in text
    assert "MTP_EXT_CUDA=0" in text


def test_a_cuda_mismatch_does_not_stop_a_cpu_build(build: Build, tmp_path: Path) -> None:
    home = fake_toolkit(tmp_path / "cuda", "12.8")
    assert build(torch_cuda="13.0", cuda_home=home, MTP_EXT_CUDA="0")["ext_modules"]


def test_no_compiler(build: Build, tmp_path: Path) -> None:
    text = refusal(build, CXX="/nonexistent/c++")
    assert "no C++ compiler '/nonexistent/c++': install g++ (`apt install g++`), or set CXX" in text
    assert "no C++ compiler 'c++'" in refusal(build, CXX=None, PATH=str(tmp_path))


@pytest.mark.parametrize(("version", "standard"), [("2.11.0", "c++17"), ("2.14.1+cu130", "c++20")])
def test_a_compiler_that_is_too_old(build: Build, tmp_path: Path, version: str, standard: str) -> None:
    old = tmp_path / "g++-5"
    old.write_text("#!/bin/sh\necho \"g++-5: error: unrecognized command line option '$2'\" >&2\nexit 1\n")
    old.chmod(0o755)
    text = refusal(build, torch_version=version, CXX=f"{old} -pipe")
    assert f"g++-5' cannot compile {standard}: install g++ 11 or newer" in text


@pytest.mark.parametrize("version", ["2.9.1", "2.10.0+cpu", "1.13.0"])
def test_a_torch_that_is_too_old(build: Build, version: str) -> None:
    text = refusal(build, torch_version=version)
    assert text == f"mtp_ext: torch {version} is too old: `pip install 'torch>=2.11'`"


@pytest.mark.parametrize("version", ["2.11.0", "2.100.0", "3.0.0", "2.14.1+cu130"])
def test_versions_are_numbers_not_strings(build: Build, version: str) -> None:
    assert build(torch_version=version)["ext_modules"]


@pytest.mark.parametrize("module", ["torch", "pybind11", "packaging.version"])
def test_a_missing_module_as_in_an_isolated_build(build: Build, monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    with mock.patch.dict(sys.modules, {module: None}):  # what `import` then raises is what it raises when absent
        with pytest.raises(SystemExit, match=r"^mtp_ext: [^\n]*--no-build-isolation[^\n]*$") as stopped:
            runpy.run_path(str(ROOT / "setup.py"))
    assert f"'{module}'" in str(stopped.value) and "torch>=2.11" in str(stopped.value)


@pytest.mark.slow
def test_a_refusal_on_the_command_line_is_one_line_and_exit_1(tmp_path: Path) -> None:
    env = {**os.environ, "CXX": "/nonexistent/c++"}
    command = [sys.executable, str(ROOT / "setup.py"), "--name"]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert (
        done.stderr.strip().splitlines()[-1].startswith("mtp_ext: no C++ compiler") and "Traceback" not in done.stderr
    )


def test_versions_agree() -> None:
    import mtp_ext

    declared = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert declared is not None
    assert importlib.metadata.version("mtp_ext") == declared[1] == mtp_ext.__version__


def test_build_info_tells_the_truth() -> None:
    from mtp_ext import _C

    info = _C.build_info()
    assert isinstance(info["cuda"], bool)
    ops = [schema.name for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("mtp_ext::_")]
    assert ops and info["cuda"] == any(torch._C._dispatch_has_kernel_for_dispatch_key(op, "CUDA") for op in ops)
    assert isinstance(info["cxx_standard"], int) and info["cxx_standard"] >= 201703


def test_the_extension_holds_no_path_of_the_machine_that_built_it() -> None:
    from mtp_ext import _C

    assert f"{ROOT}/csrc".encode() not in Path(_C.__file__).read_bytes()


def test_constraints_pin_every_dependency() -> None:
    pinned = set(re.findall(r"^([A-Za-z0-9_.-]+)==", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    names = {re.split(r"[^A-Za-z0-9_.-]", r)[0] for r in importlib.metadata.requires("mtp_ext") or []}
    assert names - pinned == {"mtp_ext"}  # an extra that holds another one
