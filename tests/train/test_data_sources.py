"""Sources: what is found, what is left out, and how a wrong input is reported."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from mtp_ext.train.checkpoint.resume import find_checkpoint, hold_run
from mtp_ext.train.data.config import TEXT_SUFFIXES, DataConfig
from mtp_ext.train.data.sources import find_files
from tests.train.tiny import run, tiny_config, write_corpus


def write(root: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return root


def names(*source: str | Path, exclude: tuple[str, ...] | None = None) -> list[str]:
    return [file.name for file in find_files([str(entry) for entry in source], TEXT_SUFFIXES, exclude)]


def test_a_directory_gives_its_text_files_in_order_without_hidden_and_foreign_ones(tmp_path: Path) -> None:
    root = write(
        tmp_path / "project",
        {
            "b.py": "b",
            "a.PY": "a",
            "src/deep/c.cpp": "c",
            "image.png": "x",
            ".hidden.py": "x",
            ".git/d.py": "x",
            "CVS/d.py": "x",
            "src/__pycache__/d.py": "x",
            "node_modules/d.js": "x",
            "env/pyvenv.cfg": "x",
            "env/lib/d.py": "x",
        },
    )
    assert names(root) == ["project/a.PY", "project/b.py", "project/src/deep/c.cpp"]
    assert names(root, exclude=("src/*",)) == ["project/a.PY", "project/b.py"]


def test_files_and_globs_are_read_whatever_their_suffix_and_once(tmp_path: Path) -> None:
    root = write(tmp_path, {"a.log": "a", "deep/er/b.log": "b", "c.txt": "c"})
    log = (root / "a.log").as_posix()
    assert names(log) == [log]
    assert names(root / "**" / "*.log") == [log, (root / "deep/er/b.log").as_posix()]
    assert len(names(root, root / "c.txt", root / "*.txt", root / "a.log")) == 2


def test_the_standard_library_is_split_by_package_and_comes_without_tests() -> None:
    files = find_files(["stdlib"], TEXT_SUFFIXES)
    groups = {file.name: file.group for file in files}
    assert groups["stdlib/argparse.py"] == "stdlib/argparse"
    assert groups["stdlib/email/message.py"] == "stdlib/email"
    assert not [name for name in groups if "/test/" in name or "site-packages" in name or "__pycache__" in name]


@pytest.mark.parametrize("entry", ["missing", "missing/*.py", "[no]match"])
def test_an_entry_that_matches_nothing_is_named(tmp_path: Path, entry: str) -> None:
    with pytest.raises(ValueError, match=r"source '.*(missing|match).* matches none"):
        names(tmp_path / entry)


def test_a_directory_without_text_is_an_error_that_says_what_was_looked_for(tmp_path: Path) -> None:
    write(tmp_path, {"image.png": "x"})
    with pytest.raises(ValueError, match=r"no file to read: looked for the suffixes .*\.py"):
        names(tmp_path)


def test_options_out_of_range_are_named() -> None:
    with pytest.raises(ValueError, match="validation_fraction must be in"):
        DataConfig(validation_fraction=1.5)
    with pytest.raises(ValueError, match="seed must be a non-negative"):
        DataConfig(seed=-1)
    with pytest.raises(ValueError, match="source must name"):
        DataConfig(source=())
    with pytest.raises(TypeError, match="suffixes must be a sequence of strings"):
        DataConfig(suffixes=(1,))  # type: ignore[arg-type]
    assert DataConfig(source="abc").source == ("abc",)  # type: ignore[arg-type]
    assert DataConfig(exclude=["a", "b"]).exclude == ("a", "b")  # type: ignore[arg-type]


def test_linked_directories_are_followed_once_and_without_loops(tmp_path: Path) -> None:
    root = write(tmp_path / "project", {"a/one.txt": "1", "b/two.txt": "2"})
    write(tmp_path / "elsewhere", {"three.txt": "3", "deep/four.txt": "4"})
    (root / "0-outside").symlink_to(tmp_path / "elsewhere")
    (root / "0-again").symlink_to(tmp_path / "elsewhere" / "deep")
    (root / "0-inside").symlink_to(root / "b")  # the real path names a file, whatever the order
    (root / "a" / "up").symlink_to(root)
    (root / "b" / "across").symlink_to(root / "a")
    (tmp_path / "elsewhere" / "back").symlink_to(root)
    (root / "self").symlink_to("self")
    assert names(root) == [
        "project/a/one.txt",
        "project/b/two.txt",
        "project/0-again/four.txt",
        "project/0-outside/three.txt",
    ]
    linked = tmp_path / "linked"
    linked.symlink_to(root)
    assert len(names(linked)) == 4
    assert names(root / "**" / "*.txt")[0].endswith("0-again/four.txt") and len(names(root / "**" / "*.txt")) == 4


def test_links_to_nothing_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = write(tmp_path / "d", {"a.txt": "a"})
    (root / "b.txt").symlink_to(tmp_path / "gone")
    assert names(root) == ["d/a.txt"]
    assert caplog.messages == [f"left out of the corpus: {root / 'b.txt'} is a link to nothing"]


@pytest.mark.parametrize("source", [".", "**/*.txt", "sub"])
def test_an_unreadable_directory_is_named_unless_it_is_excluded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    """Not with permissions, which do not hold for root."""
    root = write(tmp_path / "d", {"a.txt": "a", "sub/locked/b.txt": "b", "sub/c.txt": "c"})
    scandir = os.scandir

    def refuse(path: Any) -> Any:
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    pattern = "locked/*" if source == "sub" else "sub/locked/*"
    with pytest.raises(ValueError, match=r"source: cannot read .*locked \(Permission denied\)") as error:
        names(root / source)
    assert f"leave it out with data.exclude '{pattern}'" in str(error.value)
    assert [Path(name).name for name in names(root / source, exclude=(pattern,))]


def test_a_file_that_cannot_be_looked_at_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write(tmp_path / "d", {"a.txt": "a", "b.txt": "b"})
    stat = Path.stat

    def refuse(path: Path, **options: Any) -> Any:
        if path.name == "b.txt":
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, **options)

    monkeypatch.setattr(Path, "stat", refuse)
    with pytest.raises(ValueError, match=r"source: cannot read .*b\.txt \(Permission denied\)"):
        names(root)


def test_what_training_writes_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run in the directory that it trains on resumes, and a later run sees the same corpus."""
    write_corpus(tmp_path / "corpus")
    monkeypatch.chdir(tmp_path)
    config = tiny_config(tmp_path, max_steps=1, out=Path("runs/one"), cache=Path("cache"))
    suffixes = (*TEXT_SUFFIXES, ".json", ".log")
    data = dataclasses.replace(config.data, source=(".",), suffixes=suffixes, tokenizer="bpe:300")
    config = dataclasses.replace(config, data=data)
    before = [file.relative for file in find_files((".",), suffixes)]
    run(config)
    checkpoint = find_checkpoint("runs/one", None)
    run(dataclasses.replace(config, max_steps=2), checkpoint)
    run(dataclasses.replace(config, out=Path("runs/two")))
    Path("copied").mkdir()
    assert checkpoint is not None
    shutil.copytree(Path("runs/one/checkpoints/step-00000002"), Path("copied/step"))
    Path("runs/begun").mkdir()
    with hold_run(Path("runs/begun"), None) as begun:
        write(begun, {"config.json": "{}"})
        write(tmp_path / "cache" / "ab.partial-cd", {"tokenizer/tokenizer.json": "{}"})
        for source in (".", "./*", "**/*"):
            files = [f for f in find_files((source,), suffixes) if f.path.suffix != ".lock"]  # an empty file
            assert sorted(f.path.resolve().relative_to(tmp_path).as_posix() for f in files) == sorted(before), source
    assert len(list((tmp_path / "cache").glob("*/manifest.json"))) == 1
    assert find_files(("runs/one",), suffixes)  # named, it is read
