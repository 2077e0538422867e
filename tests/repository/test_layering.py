"""Dependencies point down: docs/internals/architecture.md's layers, checked against every include and import."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "python" / "mtp_ext"
CSRC = ROOT / "csrc"

# A part may depend on parts of a smaller rank and on itself; parts of one rank are strangers to each other.
PYTHON_RANKS = {
    "_C": 0,
    "ops": 1,
    "nn": 2,
    "distributed": 3,
    "generate": 4,
    "train": 5,
    "plan": 6,
    "__init__": 7,  # the facade re-exports; nothing below may lean on it
    "cli": 8,
    "__main__": 9,
}
# The same inside a part, by folder or module; those that are not listed stand at the top of their part.
INNER_RANKS = {
    "ops": {"common": 0, "loss": 1},
    "nn": {
        **{"variants": 0, "config": 1, "schedules": 1, "transformer": 2, "heads": 3},
        **{"multi_token_model": 4, "model": 5, "composed": 5, "interop": 6},
    },
    "train": {
        **{"data": 0, "loss_weights": 0, "progress": 0, "metrics": 0, "device": 0, "muon": 0, "interrupt": 0},
        **{"config": 1, "config_file": 2, "evaluation": 2, "optim": 2, "checkpoint": 3, "report": 3, "step": 3},
        **{"trainer": 4, "initial_weights": 4, "loop": 5, "run": 6},
    },
}
CPP_RANKS = {"core": 0, "cpu": 1, "kernels": 1, "ops": 2}
TENSOR_HEADERS = re.compile(r"^(torch|ATen|c10|caffe2|pybind11)/|^Python\.h$")


def python_imports(source: str, module: tuple[str, ...], is_package: bool) -> Iterator[tuple[str, ...]]:
    """The modules of mtp_ext that a module's source imports, absolute, wherever in the file the import stands.

    ``from a.b import c`` gives ``a.b.c``: whether ``c`` is a module is not known here.
    """
    base = module if is_package else module[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [tuple(alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = base[: len(base) - node.level + 1] if node.level else ()
            stem = start + tuple(node.module.split(".") if node.module else ())
            names = [(*stem, alias.name) for alias in node.names]
        else:
            continue
        yield from (name for name in names if name[0] == "mtp_ext")


def python_part(name: tuple[str, ...]) -> str:
    """The layer of a module name; a name that the facade exports (``from mtp_ext import MTPModel``) is __init__'s."""
    return name[1] if len(name) > 1 and name[1] in PYTHON_RANKS else "__init__"


def inner_rank(name: tuple[str, ...]) -> float:
    """The rank of a module inside its part."""
    return INNER_RANKS[name[1]].get(name[2], math.inf) if len(name) > 2 else math.inf


def inner_violation(module: tuple[str, ...], name: tuple[str, ...]) -> bool:
    """Whether a module imports a sibling part that is not below it."""
    if len(module) < 3 or len(name) < 3 or module[1] != name[1] or module[2] == name[2] or name[1] not in INNER_RANKS:
        return False
    return inner_rank(module) < math.inf and inner_rank(name) >= inner_rank(module)


def python_violations(package: Path) -> list[str]:
    found = []
    for path in sorted(package.rglob("*.py")):
        relative = path.relative_to(package)
        is_package = path.name == "__init__.py"
        module = ("mtp_ext", *relative.with_suffix("").parts[: -1 if is_package else None])
        part = python_part(module)
        assert relative.parts[0].removesuffix(".py") in PYTHON_RANKS, (
            f"{relative}: a part that PYTHON_RANKS does not know"
        )
        for name in python_imports(path.read_text(), module, is_package):
            target = python_part(name)
            if target != part and PYTHON_RANKS[target] >= PYTHON_RANKS[part]:
                found.append(f"{relative}: {part} imports {'.'.join(name)} of {target}")
            elif inner_violation(module, name):
                found.append(f"{relative}: imports {'.'.join(name)}, which is not below it")
    return found


def cpp_includes(source: str) -> Iterator[str]:
    return (match[1] for match in re.finditer(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', source, re.MULTILINE))


def cpp_violations(csrc: Path) -> list[str]:
    found = []
    for path in sorted(p for p in csrc.rglob("*") if p.suffix in (".h", ".cpp", ".cu", ".cuh")):
        relative = path.relative_to(csrc)
        part = relative.parts[0]
        assert part in CPP_RANKS, f"{relative}: a part that CPP_RANKS does not know"
        for include in cpp_includes(path.read_text()):
            target = include.split("/")[0]
            if include.startswith(".") or (target not in CPP_RANKS and (path.parent / include).exists()):
                found.append(f"{relative}: '{include}' is relative; write it from csrc/")
            elif part != "ops" and TENSOR_HEADERS.match(include):
                found.append(f"{relative}: {part} knows tensors through {include}")
            elif target in CPP_RANKS and target != part and CPP_RANKS[target] >= CPP_RANKS[part]:
                found.append(f"{relative}: {part} includes {include} of {target}")
    return found


def test_python_imports_point_down() -> None:
    assert python_violations(PACKAGE) == []


def test_cpp_includes_point_down() -> None:
    assert cpp_violations(CSRC) == []


def test_native_tests_know_no_tensors() -> None:
    for path in sorted(p for p in (ROOT / "tests" / "native").rglob("*") if p.is_file()):
        assert [i for i in cpp_includes(path.read_text()) if TENSOR_HEADERS.match(i) or i.startswith("ops/")] == [], (
            path
        )


@pytest.mark.parametrize(
    "statement",
    [
        "from mtp_ext.train.loop import train",
        "import mtp_ext.generate",
        "from ..train import loop",
        "from .. import train",
        "from mtp_ext import MTPModel",
        "def f():\n    from mtp_ext.cli import main",
        "if TYPE_CHECKING:\n    from ..distributed.mesh import Mesh",
    ],
)
def test_an_upward_import_is_found(tmp_path: Path, statement: str) -> None:
    (tmp_path / "nn").mkdir()
    (tmp_path / "nn" / "model.py").write_text(
        f"import torch\nfrom mtp_ext.ops import result\nfrom . import config\n{statement}\n"
    )
    violations = python_violations(tmp_path)
    assert len(violations) == 1 and violations[0].startswith("nn/model.py: nn imports mtp_ext")


@pytest.mark.parametrize(
    ("file", "statement"),
    [
        ("ops/common/checks.py", "from mtp_ext.ops.loss.arguments import LossCall"),
        ("ops/loss/options.py", "from mtp_ext.ops import linear_cross_entropy"),
        ("ops/loss/options.py", "from ..linear_cross_entropy import linear_cross_entropy"),
        ("nn/transformer/layers.py", "from mtp_ext.nn.heads.head import Head"),
        ("nn/heads/head.py", "from mtp_ext.nn.model import MTPModel"),
        ("train/report/display.py", "from mtp_ext.train.loop import Loop"),
        ("train/data/shards.py", "def f():\n    from mtp_ext.train.config import TrainConfig"),
    ],
)
def test_an_upward_import_inside_a_part_is_found(tmp_path: Path, file: str, statement: str) -> None:
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).write_text(statement + "\n")
    assert len(python_violations(tmp_path)) == 1


def test_generation_knows_no_training(tmp_path: Path) -> None:
    (tmp_path / "generate").mkdir()
    (tmp_path / "generate" / "__init__.py").write_text("from ..train import loop\n")
    assert python_violations(tmp_path) == ["generate/__init__.py: generate imports mtp_ext.train.loop of train"]


@pytest.mark.parametrize(
    ("part", "include"),
    [
        ("core", '#include "cpu/loss_rows.h"'),
        ("cpu", '#include "kernels/loss_rows.h"'),
        ("kernels", '#  include "ops/check.h"'),
        ("cpu", "#include <ATen/core/Tensor.h>"),
        ("kernels", "#include <torch/csrc/stable/tensor.h>"),
        ("core", '#include "../core/dtype.h"'),
    ],
)
def test_an_upward_include_is_found(tmp_path: Path, part: str, include: str) -> None:
    (tmp_path / part).mkdir()
    (tmp_path / part / "bad.h").write_text(f'#include <cmath>\n#include "core/dtype.h"\n{include}\n')
    assert len(cpp_violations(tmp_path)) == 1


def test_a_downward_include_is_none(tmp_path: Path) -> None:
    (tmp_path / "ops").mkdir()
    (tmp_path / "ops" / "good.cpp").write_text('#include <torch/csrc/stable/tensor.h>\n#include "cpu/loss_rows.h"\n')
    assert cpp_violations(tmp_path) == []
