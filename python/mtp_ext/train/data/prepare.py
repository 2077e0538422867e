"""Tokenises a corpus once into shards, in a directory named after the hash of sources, split and tokenizer.

The directory is renamed into place once it is complete. Equal inputs reuse it; any change of a file, the split or the
tokenizer gives another directory.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from mtp_ext.train.data.config import DataConfig
from mtp_ext.train.data.corpus import Corpus
from mtp_ext.train.data.dataset import (
    MANIFEST_FILE,
    TOKENIZER_DIRECTORY,
    TRAIN,
    VALIDATION,
    Dataset,
    is_dataset,
    open_dataset,
)
from mtp_ext.train.data.documents import Document
from mtp_ext.train.data.shards import DamagedDataError, SplitWriter, checksums, token_dtype
from mtp_ext.train.data.sources import located
from mtp_ext.train.data.tokenizer import BPE_PIECES, BYTES, ByteTokenizer, Tokenizer, learn_bpe, load_tokenizer

FORMAT = 1
FORMAT_DESCRIPTION = (
    "Each split is a sequence of documents, each ended by the separator. Shards are .npy files of the ids in order; "
    "document_starts is a .npy file with the position of each document's first token and, last, the number of tokens. "
    "files has the length and SHA-256 of every file."
)
BPE_PREFIX = "bpe:"
# Learning 4,096 tokens from twice as much saves 1 % of the tokens of Python source, and takes twice the time.
BPE_SAMPLE_BYTES = 4_000_000
ENCODE_BATCH_BYTES = 2_000_000


def prepare_data(config: DataConfig, cache_dir: Path) -> Dataset:
    """Opens the tokenised corpus of ``config``, and tokenises it first if necessary.

    Every call reads the inputs once to hash them, and verifies the checksums of the shards. Of concurrent processes
    with the same corpus, one prepares it and the others wait. If the source is a tokenised corpus itself, it is opened.

    Args:
        config: The corpus, its split and its tokenizer.
        cache_dir: The parent directory of prepared corpora; created if missing.
    Raises:
        MissingSourceError: There is nothing to read.
        ValueError: A source cannot be read, a record holds no text, nothing can be held out, the tokenizer is unknown,
            or a tokenised source was prepared with other options.
        DamagedDataError: The prepared data was changed or truncated; the message says how to rebuild it.
    """
    given = parse_tokenizer(config.tokenizer)
    dataset = open_tokenised(config)
    if dataset is not None:
        _check_options(config, given, dataset)
        return dataset
    corpus = Corpus(config)
    return open_or_build(config, corpus, given, cache_dir / corpus_key(config, corpus, given))


def open_tokenised(config: DataConfig, directory: str = "") -> Dataset | None:
    """Opens the source if it is a tokenised corpus; a relative one starts from ``directory``."""
    path = Path(located(config.source, directory)[0])
    if len(config.source) > 1 or not is_dataset(path):
        return None
    dataset = open_dataset(path)
    inputs = {**dataset.manifest["inputs"], "source": list(config.source), "directory": os.path.abspath(directory)}
    return replace(dataset, manifest={**dataset.manifest, "inputs": inputs})


def open_or_build(config: DataConfig, corpus: Corpus, given: Tokenizer | int, directory: Path) -> Dataset:
    """Opens ``directory``, after building it if it does not exist, with what was read this time as its inputs."""
    if not directory.exists():
        directory.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(directory.with_name(f"{directory.name}.lock")):
            if not directory.exists():
                _build(config, corpus, given, directory)
    try:
        dataset = open_dataset(directory)
    except DamagedDataError as error:
        raise DamagedDataError(f"{error}; delete that directory and run again to rebuild it") from None
    return replace(dataset, manifest={**dataset.manifest, "inputs": corpus.inputs})


def parse_tokenizer(name: str) -> Tokenizer | int:
    """Returns an existing tokenizer, or the vocabulary size of one to learn."""
    if name == BYTES:
        return ByteTokenizer()
    if not name.startswith(BPE_PREFIX):
        return load_tokenizer(Path(name).expanduser())
    try:
        return int(name.removeprefix(BPE_PREFIX))
    except ValueError:
        raise ValueError(f"tokenizer must be 'bytes', 'bpe:<vocabulary size>' or a path, got {name!r}") from None


def _check_options(config: DataConfig, given: Tokenizer | int, dataset: Dataset) -> None:
    """Raises ValueError if a tokenised source was prepared with other options than those of ``config``."""
    tokenizer, split = dataset.manifest["tokenizer"], dataset.manifest["split"]
    is_same = (
        tokenizer["name"] == config.tokenizer
        if isinstance(given, int)
        else (given.fingerprint == dataset.tokenizer.fingerprint)
    )
    wanted = {"seed": config.seed, "validation_fraction": config.validation_fraction}
    if not is_same or split != wanted:
        raise ValueError(
            f"source {config.source[0]!r} was tokenised with tokenizer {tokenizer['name']!r}, seed {split['seed']} and "
            f"validation_fraction {split['validation_fraction']}; expected the same options, got tokenizer "
            f"{config.tokenizer!r}, seed {config.seed} and validation_fraction {config.validation_fraction}"
        )


def corpus_key(config: DataConfig, corpus: Corpus, given: Tokenizer | int) -> str:
    """Returns the name of the prepared directory: a hash of everything that determines its contents."""
    tokenizer = f"{given} {BPE_SAMPLE_BYTES} {BPE_PIECES}" if isinstance(given, int) else given.fingerprint
    parts = [FORMAT, corpus.digest, config.seed, config.validation_fraction, tokenizer]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:20]


def _build(config: DataConfig, corpus: Corpus, given: Tokenizer | int, directory: Path) -> None:
    """Builds ``directory`` atomically; the caller holds its lock."""
    for leftover in directory.parent.glob(f"{directory.name}.partial-*"):  # from a killed process
        shutil.rmtree(leftover)
    partial = directory.with_name(f"{directory.name}.partial-{uuid.uuid4().hex}")
    (partial / TOKENIZER_DIRECTORY).mkdir(parents=True)
    try:
        tokenizer = learn_bpe(_sample(config, corpus), given) if isinstance(given, int) else given
        tokenizer.save(partial / TOKENIZER_DIRECTORY)
        manifest: dict[str, Any] = {
            "format": FORMAT,
            "fingerprint": directory.name,
            "description": FORMAT_DESCRIPTION,
            "inputs": corpus.inputs,
            "tokenizer": {
                "name": config.tokenizer,
                "fingerprint": tokenizer.fingerprint,
                "vocab_size": tokenizer.vocab_size,
                "separator_id": tokenizer.separator_id,
            },
            "dtype": np.dtype(token_dtype(tokenizer.vocab_size)).name,
            "split": {"seed": config.seed, "validation_fraction": config.validation_fraction},
            "splits": _write_splits(corpus, tokenizer, partial),
        }
        manifest["files"] = checksums(partial)
        (partial / MANIFEST_FILE).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        partial.rename(directory)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError) and Path(error.filename or partial).is_relative_to(partial):  # not a source file
            raise RuntimeError(
                f"cache: cannot write the prepared corpus to {directory.parent} ({error.strerror or error}); free "
                "space there, or pass another --cache"
            ) from error
        raise


def _write_splits(corpus: Corpus, tokenizer: Tokenizer, directory: Path) -> dict[str, Any]:
    """Tokenises the documents into the files of both splits; returns their manifest entries."""
    dtype = token_dtype(tokenizer.vocab_size)
    writers = {name: SplitWriter(directory, name, dtype, tokenizer.separator_id) for name in (TRAIN, VALIDATION)}
    sides = iter(corpus.in_validation.tolist())
    for batch in _batches(corpus.documents("tokenising")):
        encoded = tokenizer.encode_batch([document.text for document in batch])
        for document, ids in zip(batch, encoded, strict=True):
            writers[VALIDATION if next(sides) else TRAIN].add(document.name, ids, len(document.data))
    return {name: writer.close() for name, writer in writers.items()}


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    """Groups documents into batches large enough to use all cores and small enough for memory."""
    batch: list[Document] = []
    n_bytes = 0
    for document in documents:
        batch.append(document)
        n_bytes += len(document.data)
        if n_bytes >= ENCODE_BATCH_BYTES:
            yield batch
            batch, n_bytes = [], 0
    if batch:
        yield batch


def _sample(config: DataConfig, corpus: Corpus) -> Iterator[str]:
    """Samples training documents of about ``BPE_SAMPLE_BYTES`` in total, in corpus order."""
    training = np.flatnonzero(~corpus.in_validation)
    if not training.size:
        raise ValueError(
            f"tokenizer {config.tokenizer!r} is learnt from the training split, which validation_fraction "
            f"{config.validation_fraction} leaves empty; give the tokenizer of a checkpoint, or 'bytes'"
        )
    shuffled = np.random.default_rng(config.seed).permutation(training)
    before = np.cumsum(corpus.sizes[shuffled]) - corpus.sizes[shuffled]
    chosen = np.zeros(corpus.sizes.size, dtype=np.bool_)
    chosen[shuffled[before < BPE_SAMPLE_BYTES]] = True
    for document, wanted in zip(corpus.documents("learning a tokenizer"), chosen.tolist(), strict=True):
        if wanted:
            yield document.text[:BPE_SAMPLE_BYTES]
