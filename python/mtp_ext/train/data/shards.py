"""Token shards: memory-mapped ``.npy`` files of ids, with document boundaries and checksums."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

SHARD_TOKENS = 1 << 26  # 128 MiB of uint16, buffered in memory before writing
TokenArray = npt.NDArray[Any]  # uint16 or uint32


class DamagedDataError(RuntimeError):
    """Prepared data on the disk is damaged."""


def token_dtype(vocab_size: int) -> type[np.uint16] | type[np.uint32]:
    """Returns the smallest dtype that holds every id."""
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


def documents_file(split: str) -> str:
    """Returns the name of the file with the document boundaries of a split."""
    return f"{split}-documents.npy"


@dataclass(frozen=True)
class TokenSplit:
    """The concatenated documents of one side of the split, each ended by a separator.

    Attributes:
        name: ``"train"`` or ``"validation"``.
        shards: Memory-mapped ids; all but the last have the same length.
        document_starts: ``[n_documents + 1]`` int64, where each document begins; the last entry is ``n_tokens``.
        n_bytes: Bytes of the documents' texts in UTF-8.
        names_file: JSON list of the documents' names, if kept.
    """

    name: str
    shards: tuple[TokenArray, ...]
    document_starts: npt.NDArray[np.int64]
    n_bytes: int
    names_file: Path | None = None

    @property
    def n_documents(self) -> int:
        return self.document_starts.size - 1

    @property
    def n_tokens(self) -> int:
        """Number of tokens, including one separator per document."""
        return int(self.document_starts[-1])

    @property
    def bytes_per_token(self) -> float:
        """Bytes of text per token: divides a loss in nats per token into nats per byte."""
        return self.n_bytes / self.n_tokens

    @cached_property
    def document_names(self) -> list[str]:
        """Paths of the files (or file:line of the records), in the order of the documents."""
        names: list[str] = json.loads(self.names_file.read_text(encoding="utf-8")) if self.names_file else []
        return names

    def read(self, start: int, stop: int) -> TokenArray:
        """Returns ids ``start`` to ``stop`` (exclusive), cut at the end of the split; a view if within one shard."""
        if len(self.shards) == 1:
            return self.shards[0][start:stop]
        length = self.shards[0].size
        first, last = start // length, min((stop - 1) // length, len(self.shards) - 1)
        parts = [self.shards[i][max(start - i * length, 0) : stop - i * length] for i in range(first, last + 1)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def document(self, index: int) -> TokenArray:
        """Returns the ids of one document, with its separator."""
        if not 0 <= index < self.n_documents:
            raise ValueError(f"index must be in [0, {self.n_documents}), got {index}")
        return self.read(int(self.document_starts[index]), int(self.document_starts[index + 1]))


class SplitWriter:
    """Writes the files of one split into a directory.

    Args:
        directory: The directory to write to.
        name: Name of the split, and prefix of its files.
        dtype: Dtype of the ids.
        separator_id: Id that ends each document.
        shard_tokens: Length of a shard.
    """

    def __init__(
        self,
        directory: Path,
        name: str,
        dtype: type[np.uint16] | type[np.uint32],
        separator_id: int,
        shard_tokens: int = SHARD_TOKENS,
    ) -> None:
        self._directory, self._name, self._dtype, self._shard_tokens = directory, name, dtype, shard_tokens
        self._separator = np.array([separator_id], dtype=dtype)
        self._pending: list[TokenArray] = []
        self._n_pending = 0
        self._starts = array("q", [0])
        self._names: list[str] = []
        self._n_bytes = 0
        self._shard_files: list[str] = []

    def add(self, name: str, ids: npt.NDArray[np.int64], n_bytes: int) -> None:
        """Appends a document and a separator."""
        self._pending += [ids.astype(self._dtype), self._separator]
        self._n_pending += ids.size + 1
        self._starts.append(self._starts[-1] + ids.size + 1)
        self._names.append(name)
        self._n_bytes += n_bytes
        if self._n_pending >= self._shard_tokens:
            self._write_full_shards()

    def close(self) -> dict[str, Any]:
        """Writes the rest and returns the split's manifest entry."""
        self._write_full_shards()
        if self._n_pending:
            self._write_shard(np.concatenate(self._pending))
        starts_file, names_file = documents_file(self._name), f"{self._name}-names.json"
        np.save(self._directory / starts_file, np.frombuffer(self._starts, dtype=np.int64))
        (self._directory / names_file).write_text(json.dumps(self._names), encoding="utf-8")
        return {
            "documents": len(self._names),
            "tokens": self._starts[-1],
            "bytes": self._n_bytes,
            "shards": self._shard_files,
            "document_starts": starts_file,
            "document_names": names_file,
        }

    def _write_full_shards(self) -> None:
        if self._n_pending < self._shard_tokens:
            return
        tokens = np.concatenate(self._pending)
        n_full = tokens.size // self._shard_tokens * self._shard_tokens
        for start in range(0, n_full, self._shard_tokens):
            self._write_shard(tokens[start : start + self._shard_tokens])
        self._pending, self._n_pending = [tokens[n_full:].copy()], tokens.size - n_full

    def _write_shard(self, tokens: TokenArray) -> None:
        file = f"{self._name}-{len(self._shard_files):05d}.npy"
        np.save(self._directory / file, tokens)
        self._shard_files.append(file)


def open_split(directory: Path, name: str, entry: Mapping[str, Any]) -> TokenSplit:
    """Maps the files of one split (their checksums are verified elsewhere).

    Args:
        directory: The prepared data.
        name: Name of the split.
        entry: The result of ``SplitWriter.close``.
    """
    shards = tuple(np.asarray(np.load(directory / file, mmap_mode="r")) for file in entry["shards"])
    return TokenSplit(
        name, shards, np.load(directory / entry["document_starts"]), entry["bytes"], directory / entry["document_names"]
    )


def checksums(directory: Path) -> dict[str, dict[str, Any]]:
    """Returns length in bytes and SHA-256 of every file below ``directory``, by relative path."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {
        path.relative_to(directory).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        for path in files
    }


def verify_files(directory: Path, expected: Mapping[str, Mapping[str, Any]]) -> None:
    """Compares the files of ``directory`` with their recorded ``checksums``.

    Raises:
        DamagedDataError: A file is missing, truncated or changed.
    """
    for name, file in expected.items():
        path = directory / name
        if not path.is_file():
            raise damaged(directory, f"{name} is missing")
        if path.stat().st_size != file["bytes"]:
            raise damaged(directory, f"{name} has {path.stat().st_size} bytes, expected {file['bytes']}")
        if sha256_of(path) != file["sha256"]:
            raise damaged(directory, f"the checksum of {name} differs from the manifest's")


def damaged(directory: Path, problem: str) -> DamagedDataError:
    return DamagedDataError(f"the prepared data in {directory} is damaged: {problem}")


def sha256_of(path: Path) -> str:
    """Returns the SHA-256 of a file in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
