"""Finds the corpus that a model was trained on, wherever it is now: its sources, or its tokens in the cache."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mtp_ext.train.data.config import DataConfig
from mtp_ext.train.data.corpus import Corpus
from mtp_ext.train.data.dataset import Dataset, open_dataset
from mtp_ext.train.data.prepare import BPE_PREFIX, corpus_key, open_or_build, open_tokenised
from mtp_ext.train.data.shards import DamagedDataError
from mtp_ext.train.data.sources import MissingSourceError, located
from mtp_ext.train.data.tokenizer import Tokenizer

_log = logging.getLogger(__name__)


class ChangedCorpusError(ValueError):
    """What was found is not the corpus that the model was trained on."""


@dataclass(frozen=True)
class EarlierCorpus:
    """The corpus that a model was trained on.

    Attributes:
        fingerprint: Hash of its inputs, its split and its tokenizer.
        inputs: What its manifest says of its sources: how much they held, where they were and what they were called.
        tokenizer: Its tokenizer.
    """

    fingerprint: str
    inputs: Mapping[str, Any]
    tokenizer: Tokenizer


def find_again(config: DataConfig, cache_dir: Path, earlier: EarlierCorpus) -> Dataset:
    """Opens an earlier corpus, and tokenises it again if necessary.

    Relative sources are looked for where they were, then in the current directory; if they are gone, the tokens in the
    cache are enough. Sources that ``config`` names anew have to be there and to hold the same.

    Args:
        config: The corpus, with the sources as they are named now.
        cache_dir: The parent directory of prepared corpora.
        earlier: What it has to be; its tokenizer is not learnt again.
    Raises:
        MissingSourceError: Neither its sources nor its tokens are there.
        ChangedCorpusError: Its sources hold something else now.
        DamagedDataError: Its prepared data was changed or truncated; the message says how to rebuild it.
    """
    missing: MissingSourceError | None = None
    changed: ChangedCorpusError | None = None
    for directory in _places(config, earlier):
        try:
            return _look(config, directory, cache_dir, earlier)
        except MissingSourceError as error:
            missing = missing or error
        except ChangedCorpusError as error:
            changed = changed or error
    if changed is not None:
        raise changed
    path = cache_dir / earlier.fingerprint
    if not path.exists() or _is_new(config, earlier):
        raise MissingSourceError(f"{missing}" + f", nor are its tokens in {path}" * (not path.exists()))
    try:
        dataset = _same(open_dataset(path), earlier, path)
    except DamagedDataError as error:
        raise DamagedDataError(
            f"{error}; restore its source ({missing}), delete that directory and run again to rebuild it"
        ) from None
    _log.warning("data: %s; continuing with its tokens in %s", missing, path)
    return replace(dataset, manifest={**dataset.manifest, "inputs": earlier.inputs})


def _is_new(config: DataConfig, earlier: EarlierCorpus) -> bool:
    """Returns True if the sources were named anew; old checkpoints do not tell."""
    return "directory" in earlier.inputs and earlier.inputs["source"] != list(config.source)


def _places(config: DataConfig, earlier: EarlierCorpus) -> list[str]:
    """Returns the directories that relative sources may start from; "" is the current one."""
    before = "" if _is_new(config, earlier) else earlier.inputs.get("directory", "")
    # What both directories make the same path is looked at once.
    return list({tuple(map(os.path.abspath, located(config.source, place))): place for place in (before, "")}.values())


def _look(config: DataConfig, directory: str, cache_dir: Path, earlier: EarlierCorpus) -> Dataset:
    """Opens an earlier corpus, whose relative sources are now in ``directory``."""
    before = earlier.inputs
    names = before.get("names")  # absent in old checkpoints
    tokenised = open_tokenised(config, directory)
    if tokenised is not None:
        dataset = _same(tokenised, earlier, config.source[0])
        return replace(dataset, manifest={**dataset.manifest, "inputs": {**dataset.manifest["inputs"], "names": names}})
    if names is not None and len(names) != len(config.source):
        raise ChangedCorpusError(
            f"expected {len(names)} sources for {', '.join(names)}, got {', '.join(config.source)}"
        )
    corpus = Corpus(config, directory, names)
    learns = config.tokenizer.startswith(BPE_PREFIX)
    given = int(config.tokenizer.removeprefix(BPE_PREFIX)) if learns else earlier.tokenizer
    if corpus_key(config, corpus, given) != earlier.fingerprint:
        found, kept = corpus.inputs, cache_dir / earlier.fingerprint
        raise ChangedCorpusError(
            f"{', '.join(located(config.source, directory))} holds {found['documents']:,} documents of "
            f"{found['bytes']:,} bytes, expected the earlier {before['documents']:,} of {before['bytes']:,}; "
            "files were changed, added, removed or renamed" + f" (their tokens are still in {kept})" * kept.exists()
        )
    path = cache_dir / earlier.fingerprint
    return _same(open_or_build(config, corpus, earlier.tokenizer, path), earlier, path)


def _same(dataset: Dataset, earlier: EarlierCorpus, path: str | Path) -> Dataset:
    """Returns a prepared corpus if it is the earlier one.

    Raises:
        ChangedCorpusError: It is not.
    """
    for what, found, expected in (
        ("corpus", dataset.fingerprint, earlier.fingerprint),
        ("tokenizer", dataset.tokenizer.fingerprint, earlier.tokenizer.fingerprint),
    ):
        if found != expected:
            raise ChangedCorpusError(f"{path} holds the tokens of another {what} ({found}, expected {expected})")
    return dataset
