"""The configuration of the corpus and its tokenizer, for the command line and TOML files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

TEXT_SUFFIXES: tuple[str, ...] = tuple(
    (
        ".c .cc .cpp .cxx .h .hh .hpp .cu .cuh .cs .go .hs .java .jl .js .jsx .kt .lua .m .ml .php .pl .proto .py .pyi "
        ".r .rb .rs .scala .sh .bash .zsh .sql .swift .ts .tsx .cmake .css .html .md .rst .tex .txt .toml .yaml .yml "
        ".ini .cfg .jsonl .ndjson"
    ).split()
)


@dataclass(frozen=True)
class DataConfig:
    """The corpus: its sources, its tokenizer and its held-out split."""

    source: tuple[str, ...] = ("stdlib",)
    """Directories (searched recursively), files and globs of text or code; files named .jsonl or .ndjson hold one JSON
    object per line. "stdlib" is the source of the running Python's standard library."""
    text_field: str = "text"
    """Field of a JSON line that holds the document."""
    tokenizer: str = "bpe:4096"
    """"bytes", "bpe:<vocabulary size>" (learnt from the training split), or the path of a Hugging Face tokenizer.json
    or of a directory with a saved tokenizer."""
    validation_fraction: float = 0.05
    """Share of the corpus, in bytes, held out by whole files (packages of "stdlib", JSON records); 0 holds out nothing,
    1 everything."""
    seed: int = 0
    """Seed of the split and of the sample that a tokenizer is learnt from."""
    suffixes: tuple[str, ...] = TEXT_SUFFIXES
    """Suffixes of the files taken from a directory; files and globs are read regardless of their suffix."""
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


def _strings(name: str, value: str | Sequence[str] | None) -> tuple[str, ...] | None:
    """Converts lists (from TOML) to tuples; a single string becomes a tuple of one."""
    if value is None and name == "exclude":
        return None
    values = (value,) if isinstance(value, str) else tuple(value or ())
    if not all(isinstance(item, str) for item in values):
        raise TypeError(f"{name} must be a sequence of strings, got {value!r}")
    return values
