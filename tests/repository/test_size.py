"""Size is a smell test: a file is one concern, a function fits a screen."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DIRECTORIES = ("csrc", "python", "benchmarks", "tests", "cmake", ".ci")
SUFFIXES = (".py", ".cpp", ".h", ".cu", ".cuh", ".cmake", ".sh")
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_SETUP_LINES = 80


def sources(*suffixes: str) -> list[Path]:
    found = [p for d in DIRECTORIES for p in sorted((ROOT / d).rglob("*")) if p.suffix in suffixes and p.is_file()]
    assert found
    return found


def function_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """The lines of a function's body, without its docstring: documentation may be as long as it needs to be."""
    body = node.body[1:] if ast.get_docstring(node) is not None else node.body
    return (node.end_lineno or 0) - body[0].lineno + 1 if body else 0


def test_files_are_short() -> None:
    long = {
        str(p.relative_to(ROOT)): n
        for p in sources(*SUFFIXES)
        if (n := len(p.read_text().splitlines())) > MAX_FILE_LINES
    }
    assert long == {}


def test_setup_is_short() -> None:
    assert len((ROOT / "setup.py").read_text().splitlines()) <= MAX_SETUP_LINES


def test_python_functions_are_short() -> None:
    long = {
        f"{path.relative_to(ROOT)}:{node.name}": lines
        for path in sources(".py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (lines := function_lines(node)) > MAX_FUNCTION_LINES
    }
    assert long == {}


def test_a_long_function_is_measured_without_its_docstring() -> None:
    source = 'def f():\n    """One.\n\n    Two.\n    """\n    a = 1\n\n    return a\n'
    node = ast.parse(source).body[0]
    assert isinstance(node, ast.FunctionDef) and function_lines(node) == 3
