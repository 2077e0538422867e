"""The configuration of the corpus and its tokenizer, for the command line and TOML files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

TEXT_SUFFIXES: tuple[str, ...] = tuple(
    (
        ".c .cc .cpp .cxx .h .hh .hpp .cu .cuh .cs .go .hs .java .jl .js .jsx .kt .lua .m .ml .php .pl .proto .py .pyi "
        ".r .rb .rs .scala .sh .bash .zsh .sql .swift .ts .tsx .cmake .css .html .md .rst .tex .txt .toml .yaml .yml "
        ".ini .cfg .jsonl .ndjson .json.gz .json.zst .parquet"
    ).split()
)
OnBadLine = Literal["error", "skip"]
FREE = {"resume": "free"}  # marks what may change when a run is resumed


@dataclass(frozen=True)
class DataConfig:
    """The corpus: its sources, its tokenizer and its held-out split."""

    source: tuple[str, ...] = field(default=("stdlib",), metadata=FREE)
    """Directories (searched recursively), files and globs of text or code. Files named .jsonl, .ndjson or .json hold
    one JSON object per line, .parquet files one document per row; all but these may be compressed (.gz, .zst). Also
    "stdlib", the source of the running Python's standard library, or a tokenised corpus, as a directory of the cache.
    """
    text_field: str = "text"
    """Field of a JSON line, or column of a parquet file, that holds the document."""
    on_bad_line: OnBadLine = field(default="error", metadata=FREE)
    """What to do with a line or row that holds no text (not JSON, not UTF-8, no such field, not a string): stop with an
    error that names it, or skip and count it."""
    tokenizer: str = "bpe:4096"
    """"bytes", "bpe:<vocabulary size>" (learnt from the training split), or the path of a Hugging Face tokenizer.json
    or of a directory with a saved tokenizer."""
    validation_fraction: float = 0.05
    """Share of the corpus, in bytes, held out by whole files (packages of "stdlib", JSON records); 0 holds out nothing,
    1 everything."""
    seed: int = 0
    """Seed of the split and of the sample that a tokenizer is learnt from."""
    suffixes: tuple[str, ...] = TEXT_SUFFIXES
    """Suffixes of the files taken from a directory, compressed or not; files and globs are read regardless of them."""
    exclude: tuple[str, ...] | None = None
    """Patterns of paths to exclude, relative to their directory (default: none; for "stdlib" its tests, which many
    installations lack, and generated tables)."""

    def __post_init__(self) -> None:
        for name in ("source", "suffixes", "exclude"):
            object.__setattr__(self, name, _strings(name, getattr(self, name)))
        if not self.source:
            raise ValueError("source must name at least one directory, file or glob, got none")
        if not 0.0 <= self.validation_fraction <= 1.0:
            raise ValueError(f"validation_fraction must be in [0, 1], got {self.validation_fraction!r}")
        if self.seed < 0:
            raise ValueError(f"seed must be a non-negative integer, got {self.seed!r}")
        if self.on_bad_line not in get_args(OnBadLine):
            raise ValueError(f"on_bad_line must be one of {', '.join(get_args(OnBadLine))}, got {self.on_bad_line!r}")


def _strings(name: str, value: str | Sequence[str] | None) -> tuple[str, ...] | None:
    """Converts lists (from TOML) to tuples; a single string becomes a tuple of one."""
    if value is None and name == "exclude":
        return None
    values = (value,) if isinstance(value, str) else tuple(value or ())
    if not all(isinstance(item, str) for item in values):
        raise TypeError(f"{name} must be a sequence of strings, got {value!r}")
    return values
