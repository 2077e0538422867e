"""A tokenised corpus on the disk: its tokenizer, its manifest and its splits."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtp_ext.train.data.shards import TokenSplit, damaged, documents_file, open_split, verify_files
from mtp_ext.train.data.tokenizer import Tokenizer, load_tokenizer

MANIFEST_FILE = "manifest.json"
TOKENIZER_DIRECTORY = "tokenizer"
TRAIN, VALIDATION = "train", "validation"


@dataclass(frozen=True)
class Dataset:
    """A tokenised corpus.

    Attributes:
        tokenizer: Its tokenizer.
        manifest: The contents of ``manifest.json``: inputs, tokenizer, and counts of each split.
        fingerprint: Hash of the inputs, the split and the tokenizer.
        splits: The non-empty splits by name.
    """

    tokenizer: Tokenizer
    manifest: dict[str, Any]
    fingerprint: str
    splits: dict[str, TokenSplit]

    def split(self, name: str) -> TokenSplit:
        """Returns the ``"train"`` or ``"validation"`` split.

        Raises:
            ValueError: The name is unknown, or ``validation_fraction`` left the split empty.
        """
        if name not in (TRAIN, VALIDATION):
            raise ValueError(f"split must be {TRAIN!r} or {VALIDATION!r}, got {name!r}")
        if name not in self.splits:
            raise ValueError(f"the {name} split is empty: the corpus was prepared with all documents on the other side")
        return self.splits[name]


def is_dataset(directory: Path) -> bool:
    """Returns True for a directory written by ``prepare_data``."""
    return (directory / MANIFEST_FILE).is_file() and (directory / documents_file(TRAIN)).is_file()


def open_dataset(directory: Path) -> Dataset:
    """Opens a directory written by ``prepare_data``.

    Raises:
        DamagedDataError: A file is missing, truncated or changed.
    """
    try:
        manifest = json.loads((directory / MANIFEST_FILE).read_text(encoding="utf-8"))
        fingerprint, files, splits = manifest["fingerprint"], manifest["files"], manifest["splits"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise damaged(directory, f"{MANIFEST_FILE} cannot be read ({error})") from None
    verify_files(directory, files)
    opened = {name: open_split(directory, name, entry) for name, entry in splits.items() if entry["documents"]}
    return Dataset(load_tokenizer(directory / TOKENIZER_DIRECTORY), manifest, fingerprint, opened)
