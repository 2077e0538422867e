"""The documents: links resolve, the index is complete, and docs/internals/architecture.md draws what there is."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import forked

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
ARCHITECTURE = DOCS / "internals" / "architecture.md"
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "csrc/README.md", "tests/native/emulator/README.md")),
    *sorted(DOCS.rglob("*.md")),
]
DRAWN = ("python/mtp_ext", "csrc")
BUILT = (".pyc", ".so")
SOURCES = (".py", ".h", ".cpp", ".cu", ".cuh", ".cmake", ".sh", ".md")

# What a part of a package may import: itself, and what stands to its right in architecture.md.
ORDERS = {
    "ops": ("public", "loss", "common"),
    "nn": ("interop", "models", "heads", "transformer", "schedules", "variants"),
}
PART_OF_FILE = {"huggingface": "interop", "released": "interop", "config": "variants", "variants": "variants"}


def prose(path: Path) -> str:
    return re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)


def anchors(path: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", prose(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_resolve(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        path = page.parent / name if name else page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_named_in_a_document_exist(page: Path) -> None:
    for name in re.findall(
        r"\b(?:docs|tests|benchmarks|csrc|cmake)/[\w/.-]+\.(?:md|py|sh|h|cpp|cu)\b", page.read_text()
    ):
        assert (ROOT / name).exists(), name


def test_documents_named_in_sources_exist() -> None:
    tops = ("python", "csrc", "tests", "benchmarks", "examples", "cmake", ".ci")
    for path in (path for top in tops for path in (ROOT / top).rglob("*") if path.suffix in SOURCES):
        for name in re.findall(r"\bdocs/[\w/-]+\.md\b", path.read_text()):
            assert (ROOT / name).exists(), f"{path.relative_to(ROOT)}: {name}"


def test_the_index_lists_every_document_once() -> None:
    index = DOCS / "index.md"
    listed = [(DOCS / target).resolve() for target in re.findall(r"^- \[[^]]+\]\(([^)]+)\):", index.read_text(), re.M)]
    assert sorted(listed) == sorted(page for page in PAGES if page != index)


def drawn_files(page: str) -> dict[str, list[str]]:
    """What architecture.md lists: the files of each folder, by its heading."""
    found = {}
    for section in re.split(r"^### ", page, flags=re.MULTILINE)[1:]:
        folder, _, body = section.partition("\n")
        cells = re.findall(r"^\| (`[^|]*) \|", body, re.MULTILINE)
        found[folder.strip("`/")] = [name for cell in cells for name in re.findall(r"`([^`]+)`", cell)]
    return found


def files_of_folders(root: Path) -> dict[str, list[str]]:
    """The files of every drawn folder below ``root``, but for ``__init__.py`` and what a build leaves."""
    found: dict[str, list[str]] = {}
    for top in DRAWN:
        for path in sorted(p for p in (root / top).rglob("*") if p.is_file() and p.suffix not in BUILT):
            names = found.setdefault(str(path.parent.relative_to(root)), [])
            if path.name != "__init__.py":
                names.append(path.name)
    return found


def differences(page: str, root: Path) -> list[str]:
    drawn, there = drawn_files(page), files_of_folders(root)
    found = [f"no such folder: {folder}" for folder in drawn.keys() - there.keys()]
    for folder, names in there.items():
        listed = drawn.get(folder, [])
        found += [f"not drawn: {folder}/{name}" for name in names if name not in listed]
        found += [f"drawn twice: {folder}/{name}" for name in set(listed) if listed.count(name) > 1]
        found += [f"no such file: {folder}/{name}" for name in listed if name not in names]
    return sorted(found)


def test_architecture_draws_every_file() -> None:
    assert differences(ARCHITECTURE.read_text(), ROOT) == []


@pytest.mark.parametrize(
    ("folder", "name", "difference"),
    [
        ("python/mtp_ext/nn", "new.py", "not drawn: python/mtp_ext/nn/new.py"),
        ("csrc/extra", "new.h", "not drawn: csrc/extra/new.h"),
        ("csrc/core", "row_loss.h", None),
    ],
)
def test_a_file_that_is_not_drawn_is_found(tmp_path: Path, folder: str, name: str, difference: str | None) -> None:
    (tmp_path / folder).mkdir(parents=True)
    (tmp_path / folder / name).touch()
    found = [line for line in differences(ARCHITECTURE.read_text(), tmp_path) if line.startswith("not drawn")]
    assert found == ([] if difference is None else [difference])


def test_a_drawn_file_that_is_not_there_is_found() -> None:
    page = ARCHITECTURE.read_text().replace("`options.py` |", "`choices.py` |")
    folder = "python/mtp_ext/ops/loss"
    assert differences(page, ROOT) == [f"no such file: {folder}/choices.py", f"not drawn: {folder}/options.py"]


def test_files_named_in_the_text_of_architecture_exist() -> None:
    names = {Path(name).name for name in re.findall(r"`([\w/.]+\.(?:py|h|cpp|cu|cuh))`", ARCHITECTURE.read_text())}
    there = {path.name for top in (*DRAWN, "tests", ".ci") for path in (ROOT / top).rglob("*")}
    assert names - there == set()


def test_architecture_draws_the_order_of_imports() -> None:
    page = ARCHITECTURE.read_text()
    for package, parts in ORDERS.items():
        assert re.search(rf"^{package} +{' -> '.join(parts)}$", page, re.MULTILINE)


def part_of(package: str, module: list[str]) -> str:
    """The part that a module is of, from its name below its package."""
    order = ORDERS[package]
    if module and module[0] in order:
        return module[0]
    return PART_OF_FILE.get(module[0], order[0] if package == "ops" else "models") if module else order[0]


def imports_within(package: str) -> Iterator[tuple[str, str, str]]:
    """``(file, its part, the part of a module that it imports)``."""
    base = ROOT / "python" / "mtp_ext" / package
    for path in sorted(base.rglob("*.py")):
        if path == base / "__init__.py":
            continue
        own = part_of(package, list(path.relative_to(base).with_suffix("").parts))
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith(f"mtp_ext.{package}"):
                names = node.module.split(".")[2:]
                for module in [names] if names else [[alias.name] for alias in node.names]:
                    yield str(path.relative_to(ROOT)), own, part_of(package, module)


@pytest.mark.parametrize("package", ORDERS)
def test_imports_within_a_package_follow_the_drawn_order(package: str) -> None:
    order = ORDERS[package]
    assert [edge for edge in imports_within(package) if order.index(edge[1]) > order.index(edge[2])] == []


@pytest.mark.slow
def test_the_code_of_architecture_runs(tmp_path: Path) -> None:
    (code,) = re.findall(r"^```python\n(.*?)^```$", ARCHITECTURE.read_text(), re.DOTALL | re.MULTILINE)
    forked.run_code(code, tmp_path)
