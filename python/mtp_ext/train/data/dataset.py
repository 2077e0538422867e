"""A tokenised corpus on the disk: its tokenizer, its manifest and its splits."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtp_ext.train.data.shards import TokenSplit, damaged, open_split, verify_files
from mtp_ext.train.data.tokenizer import Tokenizer, load_tokenizer

MANIFEST_FILE = "manifest.json"
TOKENIZER_DIRECTORY = "tokenizer"
TRAIN, VALIDATION = "train", "validation"


@dataclass(frozen=True)
class Dataset:
    """A tokenised corpus.

    Attributes:
        tokenizer: What it was tokenised with.
        manifest: The hash of the inputs, the tokenizer, and the counts of each split, as in ``manifest.json``.
        fingerprint: Hash of the inputs, the split and the tokenizer.
        splits: The splits that are not empty, by name.
    """

    tokenizer: Tokenizer
    manifest: dict[str, Any]
    fingerprint: str
    splits: dict[str, TokenSplit]

    def split(self, name: str) -> TokenSplit:
        """The ``"train"`` or ``"validation"`` split.

        Raises:
            ValueError: There is no such split, or ``validation_fraction`` left it empty.
        """
        if name not in (TRAIN, VALIDATION):
            raise ValueError(f"split must be {TRAIN!r} or {VALIDATION!r}, got {name!r}")
        if name not in self.splits:
            raise ValueError(f"the {name} split is empty: the corpus was prepared with all documents on the other side")
        return self.splits[name]


def open_dataset(directory: Path) -> Dataset:
    """Opens a directory that ``prepare_data`` made.

    Raises:
        DamagedDataError: A file is missing, cut short or changed.
    """
    try:
        manifest = json.loads((directory / MANIFEST_FILE).read_text(encoding="utf-8"))
        fingerprint, files, splits = manifest["fingerprint"], manifest["files"], manifest["splits"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise damaged(directory, f"{MANIFEST_FILE} cannot be read ({error})") from None
    verify_files(directory, files)
    opened = {name: open_split(directory, name, entry) for name, entry in splits.items() if entry["documents"]}
    return Dataset(load_tokenizer(directory / TOKENIZER_DIRECTORY), manifest, fingerprint, opened)
