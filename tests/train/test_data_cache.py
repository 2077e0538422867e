"""Prepared corpora are found again, rebuilt when anything changes, never half written, and damage is noticed."""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from mtp_ext.train.data import DamagedDataError, HuggingFaceTokenizer, prepare, prepare_data, shards
from mtp_ext.train.data.tokenizer import learn_bpe
from tests.train.test_data_prepare import TEXTS, config, texts
from tests.train.test_data_sources import write


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write(tmp_path / "source", {**TEXTS, "empty.py": "", "sub/data.bin": b"\0"})


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The directories that were built, as they are built."""
    built: list[Path] = []
    build = prepare._build

    def record(config: Any, corpus: Any, given: Any, directory: Path) -> None:
        built.append(directory)
        build(config, corpus, given, directory)

    monkeypatch.setattr(prepare, "_build", record)
    return built


def test_equal_inputs_are_prepared_once(source: Path, tmp_path: Path, builds: list[Path]) -> None:
    first = prepare_data(config(source), tmp_path / "cache")
    moved = tmp_path / "elsewhere" / "source"
    moved.parent.mkdir()
    source.rename(moved)
    second = prepare_data(config(moved), tmp_path / "cache")
    assert len(builds) == 1
    assert (first.fingerprint, first.tokenizer.fingerprint) == (second.fingerprint, second.tokenizer.fingerprint)
    assert texts(first) == texts(second)


def test_building_twice_gives_the_same_files(source: Path, tmp_path: Path) -> None:
    first, second = (prepare_data(config(source), tmp_path / name) for name in ("one", "two"))
    assert first.manifest == second.manifest  # with the checksums of all files


def test_any_change_is_prepared_anew(source: Path, tmp_path: Path, builds: list[Path]) -> None:
    cache = tmp_path / "cache"
    base = config(source)
    prepare_data(base, cache)
    variants = [
        config(source, tokenizer="bpe:301"),
        config(source, tokenizer="bytes"),
        config(source, seed=1),
        config(source, validation_fraction=0.3),
        config(source, exclude=("m0.py",)),
    ]
    for variant in variants:
        prepare_data(variant, cache)
    text = TEXTS["m3.py"]
    (source / "m3.py").write_text(text.replace("3", "4"))  # same name, same length
    changed = prepare_data(base, cache)
    assert texts(changed)["source/m3.py"] == text.replace("3", "4")
    (source / "m3.py").rename(source / "m33.py")
    prepare_data(base, cache)
    assert len(set(builds)) == len(builds) == 8
    (source / "m33.py").rename(source / "m3.py")
    (source / "m3.py").write_text(text)
    prepare_data(base, cache)
    assert len(builds) == 8, "what was prepared first is still there"


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "cut":
        path.write_bytes(content[:-2])
    else:
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


@pytest.mark.parametrize("how", ["missing", "cut", "changed"])
@pytest.mark.parametrize(
    "file", ["train-00000.npy", "validation-documents.npy", "tokenizer/tokenizer.json", "train-names.json"]
)
def test_damage_is_an_error_that_says_how_to_rebuild(source: Path, tmp_path: Path, file: str, how: str) -> None:
    cache = tmp_path / "cache"
    dataset = prepare_data(config(source), cache)
    directory = cache / dataset.fingerprint
    damage(directory / file, how)
    with pytest.raises(DamagedDataError) as error:
        prepare_data(config(source), cache)
    assert str(directory) in str(error.value) and file in str(error.value)
    assert {"missing": "is missing", "cut": "bytes, expected", "changed": "checksum"}[how] in str(error.value)
    assert "delete that directory and run again to rebuild it" in str(error.value)


@pytest.mark.parametrize("content", [None, "", "{}", "[]"])
def test_a_damaged_manifest_is_an_error(source: Path, tmp_path: Path, content: str | None) -> None:
    cache = tmp_path / "cache"
    manifest = cache / prepare_data(config(source), cache).fingerprint / "manifest.json"
    manifest.unlink()
    if content is not None:
        manifest.write_text(content)
    with pytest.raises(DamagedDataError, match=r"manifest\.json cannot be read"):
        prepare_data(config(source), cache)


def test_a_failed_preparation_leaves_nothing_and_the_next_one_works(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"

    def interrupted(self: object) -> dict[str, Any]:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shards.SplitWriter, "close", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare_data(config(source), cache)
    assert not [path for path in cache.iterdir() if path.is_dir()]
    dataset = prepare_data(config(source), cache)
    killed = cache / f"{dataset.fingerprint}.partial-of-a-killed-process"
    killed.mkdir()
    (cache / dataset.fingerprint).rename(tmp_path / "gone")
    prepare_data(config(source), cache)
    assert not killed.exists()


def test_simultaneous_preparations_wait_for_one(
    source: Path, tmp_path: Path, builds: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lock is a file's, held by an open file: for it, two threads are as foreign as two processes."""
    building = threading.Event()

    def learn_slowly(*arguments: Any) -> HuggingFaceTokenizer:
        building.set()
        time.sleep(0.5)
        return learn_bpe(*arguments)

    monkeypatch.setattr(prepare, "learn_bpe", learn_slowly)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(prepare_data, config(source), tmp_path / "cache")
        assert building.wait(60)
        second = pool.submit(prepare_data, config(source), tmp_path / "cache")
        assert first.result().manifest == second.result().manifest
    assert len(builds) == 1
    assert [path for path in (tmp_path / "cache").iterdir() if path.is_dir()] == builds


@pytest.mark.parametrize("rewritten", ["x", "x" * 50])
def test_sources_that_change_meanwhile_are_noticed(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rewritten: str
) -> None:

    def change_then_learn(*arguments: Any) -> HuggingFaceTokenizer:
        (source / "m1.py").write_text(rewritten)
        return learn_bpe(*arguments)

    monkeypatch.setattr(prepare, "learn_bpe", change_then_learn)
    with pytest.raises(RuntimeError, match="changed while they were being prepared"):
        prepare_data(config(source), tmp_path / "cache")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_prepared_corpus_is_read_from_a_directory_that_cannot_be_written(source: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    prepare_data(config(source), cache)
    cache.chmod(0o500)
    try:
        prepare_data(config(source), cache)
    finally:
        cache.chmod(0o700)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), OSError("16384 requested and 0 written")])
@pytest.mark.parametrize("stage", ["save", "load"])
def test_a_full_disk_leaves_no_part_of_a_corpus(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, error: OSError
) -> None:
    """numpy's own message has no number; an error of a source file stays what it is."""

    def fail(*_: object, **__: object) -> None:
        raise error

    cache = tmp_path / "cache"
    if stage == "save":
        monkeypatch.setattr(shards.np, "save", fail)
        expected: type[Exception] = RuntimeError
    else:
        error.filename = str(source / "m1.py")
        monkeypatch.setattr(prepare, "learn_bpe", fail)
        expected = OSError
    with pytest.raises(expected) as caught:
        prepare_data(config(source), cache)
    assert (f"cache: cannot write the prepared corpus to {cache} (" in str(caught.value)) == (stage == "save")
    assert [p.name for p in cache.iterdir() if p.suffix != ".lock"] == []
    monkeypatch.undo()
    prepare_data(config(source), cache)
