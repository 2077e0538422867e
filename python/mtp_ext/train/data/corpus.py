"""The documents of a configuration: read once to hash and split them, and again to tokenise them."""

from __future__ import annotations

import hashlib
import logging
import os
from array import array
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from mtp_ext.train.data.config import DataConfig
from mtp_ext.train.data.documents import Document, read_documents
from mtp_ext.train.data.progress import progress
from mtp_ext.train.data.sources import find_files, located, source_names
from mtp_ext.train.data.split import choose_validation, hash_group

_log = logging.getLogger(__name__)


class Corpus:
    """Reads the corpus once, keeping only each document's size and side of the split.

    Args:
        config: The corpus.
        directory: Where its relative sources start from; "" is the current directory.
        names: What its sources are called, if they were elsewhere before; see `source_names`.
    Attributes:
        digest: SHA-256 of the documents' names, groups, sizes and contents.
        sizes: ``[documents]`` int64, bytes.
        in_validation: ``[documents]`` bool.
        skipped: Number of skipped documents by reason.
    Raises:
        MissingSourceError: There is nothing to read.
        ValueError: A source cannot be read, a record holds no text, or nothing can be held out.
    """

    def __init__(self, config: DataConfig, directory: str = "", names: Sequence[str] | None = None) -> None:
        self._config, self._directory = config, directory
        source = located(config.source, directory)
        self._names = list(names or source_names(source))
        self._files = find_files(source, config.suffixes, config.exclude, self._names)
        skipped: dict[str, list[str]] = {}
        groups, sizes = array("Q"), array("q")
        digest = hashlib.sha256()
        n_bytes = sum(file.path.stat().st_size for file in self._files)
        for document in self._read("reading", n_bytes, digest, skipped):
            groups.append(hash_group(document.group, config.seed))
            sizes.append(len(document.data))
        self.digest = digest.hexdigest()
        self.sizes = np.frombuffer(sizes, dtype=np.int64)
        self.skipped = {reason: len(names) for reason, names in sorted(skipped.items())}
        self._report(skipped)
        self.in_validation = choose_validation(
            np.frombuffer(groups, dtype=np.uint64), self.sizes, config.validation_fraction
        )

    @property
    def inputs(self) -> dict[str, Any]:
        """What was read, for the manifest: where it was and what is in it."""
        return {
            "source": list(self._config.source),
            "directory": os.path.abspath(self._directory),
            "names": self._names,
            "sha256": self.digest,
            "files": len(self._files),
            "documents": self.sizes.size,
            "bytes": int(self.sizes.sum()),
            "skipped": self.skipped,
        }

    def documents(self, description: str) -> Iterator[Document]:
        """Reads the documents again, in the order of ``sizes`` and ``in_validation``.

        Raises:
            RuntimeError: They have changed.
        """
        digest = hashlib.sha256()
        changed = RuntimeError("the source files changed while they were being prepared; run again")
        for number, document in enumerate(self._read(description, int(self.sizes.sum()), digest, {})):
            if number == self.sizes.size:
                raise changed
            yield document
        if digest.hexdigest() != self.digest:
            raise changed

    def _read(
        self, description: str, n_bytes: int, digest: hashlib._Hash, skipped: dict[str, list[str]]
    ) -> Iterator[Document]:
        """Reads the documents, adding each to ``digest``, under a progress bar of ``n_bytes``."""

        def on_skip(reason: str, name: str) -> None:
            skipped.setdefault(reason, []).append(name)

        with progress(description, n_bytes) as advance:
            for document in read_documents(self._files, self._config, on_skip):
                header = f"{document.name}\0{document.group}\0{len(document.data)}\0"
                digest.update(header.encode("utf-8", "surrogateescape"))
                digest.update(document.data)
                yield document
                advance(len(document.data))

    def _report(self, skipped: dict[str, list[str]]) -> None:
        """Logs skipped documents; raises ValueError for an empty corpus."""
        reasons = "; ".join(f"{len(names)} {reason} (first: {names[0]})" for reason, names in sorted(skipped.items()))
        if not self.sizes.size:
            raise ValueError(f"source {', '.join(map(repr, self._config.source))} holds no text: {reasons}")
        if self.skipped.keys() - {"empty"}:
            _log.warning("left out of the corpus: %s", reasons)
