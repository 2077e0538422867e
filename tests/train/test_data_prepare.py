"""Preparing a corpus: the shards hold what the sources held."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mtp_ext.train.data import DataConfig, Dataset, evaluation_batches, prepare_data, shards
from tests.train.test_data_sources import write

TEXTS = {f"m{i}.py": f"def f{i}(x):\n    return x + {i}  # é 😀\n" * (i + 1) for i in range(12)} | {"tiny.py": "x"}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write(tmp_path / "source", {**TEXTS, "empty.py": "", "sub/data.bin": b"\0"})


def config(source: Path, **options: Any) -> DataConfig:
    return DataConfig(source=(str(source),), **{"tokenizer": "bpe:300", "validation_fraction": 0.2, **options})


def texts(dataset: Dataset) -> dict[str, str]:
    """Name and decoded text of all documents."""
    return {
        name: dataset.tokenizer.decode(split.document(index))
        for split in dataset.splits.values()
        for index, name in enumerate(split.document_names)
    }


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:300"])
def test_the_splits_hold_every_document_once(source: Path, tmp_path: Path, tokenizer: str) -> None:
    dataset = prepare_data(config(source, tokenizer=tokenizer), tmp_path / "cache")
    train, validation = dataset.split("train"), dataset.split("validation")
    assert not set(train.document_names) & set(validation.document_names)
    assert texts(dataset) == {f"source/{name}": text for name, text in TEXTS.items()}
    for split in (train, validation):
        assert split.shards[0].dtype == np.uint16
        ends = [split.document(i)[-1] for i in range(split.n_documents)]
        assert ends == [dataset.tokenizer.separator_id] * split.n_documents
        assert split.n_tokens == sum(shard.size for shard in split.shards)
        assert split.n_bytes == sum(len(TEXTS[name.split("/")[1]].encode()) for name in split.document_names)
    if tokenizer == "bytes":
        assert train.n_tokens == train.n_bytes + train.n_documents
    assert train.bytes_per_token == train.n_bytes / train.n_tokens


def test_the_manifest_counts(source: Path, tmp_path: Path) -> None:
    dataset = prepare_data(config(source), tmp_path / "cache")
    manifest = dataset.manifest
    total = sum(len(text.encode()) for text in TEXTS.values())
    assert manifest["inputs"] | {"sha256": ""} == {
        "source": [str(source)],
        "directory": str(Path.cwd()),
        "names": ["source"],
        "sha256": "",
        "files": 14,
        "documents": 13,
        "bytes": total,
        "skipped": {"empty": 1},
    }
    assert manifest["tokenizer"]["fingerprint"] == dataset.tokenizer.fingerprint
    for name, split in dataset.splits.items():
        entry = manifest["splits"][name]
        assert (entry["documents"], entry["tokens"], entry["bytes"]) == (
            split.n_documents,
            split.n_tokens,
            split.n_bytes,
        )
    (directory,) = (path for path in (tmp_path / "cache").iterdir() if path.is_dir())
    on_disk = {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}
    assert on_disk == {*manifest["files"], "manifest.json"}


def test_more_tokens_than_a_shard_make_several(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = prepare_data(config(source), tmp_path / "whole")
    monkeypatch.setattr(shards.SplitWriter.__init__, "__defaults__", (50,))
    sharded = prepare_data(config(source), tmp_path / "sharded")
    sizes = [shard.size for shard in sharded.split("train").shards]
    assert len(sizes) > 2 and set(sizes[:-1]) == {50} and 0 < sizes[-1] <= 50
    assert texts(sharded) == texts(whole)
    batches = [list(evaluation_batches(dataset, "train", 16, 4, 3)) for dataset in (whole, sharded)]
    for a, b in zip(*batches, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_large_vocabulary_takes_wider_ids(source: Path, tmp_path: Path) -> None:
    vocabulary = {"x": 65_535, "[UNK]": 0}
    words = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "[UNK]"}
    words_json = {"version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "WhitespaceSplit"}, "model": words}
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(words_json))
    dataset = prepare_data(config(source, tokenizer=str(path)), tmp_path / "cache")
    assert (dataset.tokenizer.vocab_size, dataset.tokenizer.separator_id) == (65_537, 65_536)
    assert {shard.dtype for split in dataset.splits.values() for shard in split.shards} == {np.dtype(np.uint32)}
    batches = evaluation_batches(dataset, "train", 8, 2, 4)
    assert {token for batch in batches for token in batch.tokens.flatten().tolist()} == {0, 65_535, 65_536}


def test_one_token_documents_train_nothing_and_break_nothing(tmp_path: Path) -> None:
    words_json = {"version": "1.0", "added_tokens": [], "model": {"type": "WordLevel", "vocab": {}, "unk_token": "?"}}
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(words_json | {"pre_tokenizer": {"type": "WhitespaceSplit"}}))
    source = write(tmp_path / "source", {f"{i}.txt": " \n" for i in range(6)})  # blanks: no token but the separator
    dataset = prepare_data(config(source, tokenizer=str(path)), tmp_path / "cache")
    train = dataset.split("train")
    assert train.n_tokens == train.n_documents == 5
    (batch,) = evaluation_batches(dataset, "train", 8, 2, 4)
    assert batch.document_ids.tolist() == [[0, 1, 2, 3, 4, 5, 5, 5, 5, 5]]


def test_a_learnt_tokenizer_never_sees_the_validation_split(source: Path, tmp_path: Path) -> None:
    first = prepare_data(config(source), tmp_path / "cache")
    held_out = first.split("validation").document_names[0].split("/")[1]
    (source / held_out).write_text("q" * len((source / held_out).read_bytes()))  # same name and size, same split
    second = prepare_data(config(source), tmp_path / "cache")
    assert second.split("validation").document_names == first.split("validation").document_names
    assert second.fingerprint != first.fingerprint
    assert second.tokenizer.fingerprint == first.tokenizer.fingerprint


def test_a_given_tokenizer_evaluates_a_corpus_that_is_all_held_out(source: Path, tmp_path: Path) -> None:
    trained = prepare_data(config(source), tmp_path / "cache")
    saved = tmp_path / "checkpoint"
    saved.mkdir()
    trained.tokenizer.save(saved)
    dataset = prepare_data(config(source, tokenizer=str(saved), validation_fraction=1.0), tmp_path / "cache")
    assert dataset.split("validation").n_documents == len(TEXTS)
    with pytest.raises(ValueError, match="the train split is empty"):
        dataset.split("train")
    with pytest.raises(
        ValueError, match=r"'bpe:300' is learnt from the training split, which validation_fraction 1\.0"
    ):
        prepare_data(config(source, validation_fraction=1.0), tmp_path / "cache")


@pytest.mark.parametrize("name", ["bpe:many", "bpe:"])
def test_an_unknown_tokenizer_is_named(source: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=f"tokenizer must be 'bytes', 'bpe:<vocabulary size>' or a path, got '{name}'"):
        prepare_data(config(source, tokenizer=name), tmp_path / "cache")


def test_the_standard_library_is_split_by_package(tmp_path: Path) -> None:
    dataset = prepare_data(DataConfig(tokenizer="bytes"), tmp_path / "cache")
    packages = {
        name: {document.split("/")[1].removesuffix(".py") for document in split.document_names}
        for name, split in dataset.splits.items()
    }
    assert not packages["train"] & packages["validation"]
    held_out = dataset.split("validation").n_bytes / dataset.manifest["inputs"]["bytes"]
    assert 0.045 < held_out <= 0.05
