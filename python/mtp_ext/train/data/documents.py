"""Documents: text files and JSON lines, plain or compressed, and rows of parquet files.

The held-out split keeps documents of one group together: the file, the top-level package of the standard library, or a
record's content (so that exact duplicates of a record stay on one side).
"""

from __future__ import annotations

import codecs
import gzip
import hashlib
import importlib
import io
import itertools
import json
import os
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtp_ext.train.data.config import DataConfig
from mtp_ext.train.data.sources import COMPRESSED, SourceFile, plain_name

JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
PARQUET_SUFFIX = ".parquet"
MODULES = {  # beyond the installed ones, by the suffix that needs them
    ".zst": "compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd",
    PARQUET_SUFFIX: "pyarrow.parquet",
}
BINARY_PROBE_BYTES = 8192  # like git: a file with a NUL byte near its beginning is binary
UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
PARQUET_ROWS, PARQUET_BUFFER = 256, 1 << 20  # decoded at a time, whatever the size of a row group

OnSkip = Callable[[str, str], None]
"""Called with the reason and the name of a skipped document."""


@dataclass(frozen=True)
class Document:
    """A text; ``data`` is its UTF-8 form."""

    name: str
    group: str
    text: str
    data: bytes


class _BadRecordError(ValueError):
    """A line or row without a text; ``reason`` is what its kind is counted under."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def read_documents(files: Sequence[SourceFile], config: DataConfig, on_skip: OnSkip) -> Iterator[Document]:
    """Yields the documents of ``files`` in order, without newline translation and without a file's byte order mark.

    Args:
        files: Text files, or files of records by their suffix.
        config: The field that holds a record's text, and what to do with a record that has none.
        on_skip: Called for each binary, undecodable or empty document, and for each bad record that is skipped.
    Raises:
        ValueError: A record has no text (the message names the file and the line), a file is damaged or truncated, or
            a package to read it is not installed.
    """
    for file in files:  # before hours of reading others
        _module(file.path)
    for file in files:
        suffix = os.path.splitext(plain_name(file.path.name))[1]
        if suffix == PARQUET_SUFFIX:
            if file.path.suffix.lower() != suffix:
                raise ValueError(f"source: {file.path} is compressed twice; expected a .parquet file")
            yield from _records(file, "row", _rows(file.path, config.text_field), _row_text, config, on_skip)
        elif suffix in JSON_SUFFIXES:
            yield from _records(file, "line", _lines(file.path), _line_text, config, on_skip)
        else:
            yield from _text(file, on_skip)


def _module(path: Path) -> Any:
    """Imports what reading a file takes beyond the standard library; ``None`` if nothing."""
    name = MODULES.get(path.suffix.lower())
    try:
        return name and importlib.import_module(name)
    except ImportError as error:
        raise ValueError(
            f"source: reading {path} takes the module {name}, which cannot be imported ({error}); "
            f"`pip install {str(name).removesuffix('.parquet')}`"
        ) from None


@contextmanager
def _opened(path: Path) -> Iterator[io.BufferedReader]:
    """Opens a file, decompressing it according to its suffix.

    Raises:
        ValueError: It is damaged or truncated.
    """
    if path.suffix.lower() not in COMPRESSED:
        with path.open("rb") as plain:
            yield plain
        return
    library = _module(path) or gzip
    damage = (gzip.BadGzipFile, zlib.error) if library is gzip else (library.ZstdError,)
    try:
        if not path.stat().st_size:
            raise EOFError("the file is empty")  # which gzip takes for the end of one
        with io.BufferedReader(library.open(path)) as stream:
            yield stream
    except (EOFError, *damage) as error:
        raise ValueError(f"source: {path} is truncated, damaged or not compressed ({error})") from None


def _text(file: SourceFile, on_skip: OnSkip) -> Iterator[Document]:
    """Yields the document of a text file."""
    with _opened(file.path) as stream:
        data = stream.read().removeprefix(codecs.BOM_UTF8)
    if not data:
        on_skip("empty", file.name)
    elif data.startswith(UTF16_MARKS):
        on_skip("UTF-16", file.name)
    elif b"\0" in data[:BINARY_PROBE_BYTES]:
        on_skip("binary", file.name)
    else:
        try:
            yield Document(file.name, file.group, data.decode("utf-8"), data)
        except UnicodeDecodeError:
            on_skip("not UTF-8", file.name)


def _records(
    file: SourceFile,
    unit: str,
    records: Iterator[tuple[int, Any]],
    text_of: Callable[[Any, str], str],
    config: DataConfig,
    on_skip: OnSkip,
) -> Iterator[Document]:
    """Yields the documents of a file's numbered records; ``text_of`` reads one, and raises `_BadRecordError`."""
    number = 0
    for number, record in records:
        name = f"{file.name}:{number}"
        try:
            text = text_of(record, config.text_field)
            data = _utf8(text)
        except _BadRecordError as error:
            if config.on_bad_line == "error":
                raise ValueError(f"{file.path}, {unit} {number}: {error}") from None
            on_skip(f"bad {unit}, {error.reason}", name)
            continue
        if data:
            yield Document(name, hashlib.blake2b(data, digest_size=16).hexdigest(), text, data)
        else:
            on_skip("empty", name)
    if not number:
        on_skip("empty", file.name)


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yields the numbered lines of a file of JSON lines; blank ones are left out.

    Raises:
        ValueError: Its beginning shows that it is no such file.
    """
    with _opened(path) as stream:
        start = stream.peek(BINARY_PROBE_BYTES).removeprefix(codecs.BOM_UTF8).lstrip()
        if start.startswith(UTF16_MARKS):
            raise ValueError(f"source: {path} is UTF-16, expected UTF-8; `iconv -f UTF-16 -t UTF-8` converts it")
        if start.startswith(b"[") or start.partition(b"\n")[0].strip() == b"{":
            what, program = ("an array", ".[]") if start.startswith(b"[") else ("an object over several lines", ".")
            raise ValueError(
                f"source: {path} holds {what}, expected one JSON object per line; `jq -c '{program}'` converts it"
            )
        for number, line in enumerate(stream, start=1):
            line = line.removeprefix(codecs.BOM_UTF8)  # within the file, where several were concatenated
            if line.strip():
                yield number, line


def _line_text(line: bytes, field: str) -> str:
    """Returns the text of a JSON line."""
    try:
        record = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # both decoders raise subclasses of ValueError
        reason = "not UTF-8" if isinstance(error, UnicodeDecodeError) else "not JSON"
        raise _BadRecordError(reason, f"expected a JSON object in UTF-8, got {line[:60]!r} ({error})") from None
    if not isinstance(record, dict):
        raise _BadRecordError("not an object", f"expected a JSON object, got {line[:60]!r}")
    if field not in record:
        fields = ", ".join(map(repr, record)) or "none"
        raise _BadRecordError("no text_field", f"text_field {field!r} is missing; the fields are {fields}")
    return _string(record[field], field)


def _rows(path: Path, column: str) -> Iterator[tuple[int, Any]]:
    """Yields one column of a parquet file as numbered scalars.

    Raises:
        ValueError: It has no such column, or is damaged or truncated.
    """
    parquet, arrow = _module(path), importlib.import_module("pyarrow")
    with path.open("rb") as file:  # pyarrow opens only paths in UTF-8
        try:
            table = parquet.ParquetFile(file, buffer_size=PARQUET_BUFFER, page_checksum_verification=True)
            names = table.schema_arrow.names
            if names.count(column) != 1:
                raise ValueError(
                    f"{path}: text_field must be the name of one column, got {column!r}; the columns are "
                    f"{', '.join(map(repr, names))}"
                )
            batches = table.iter_batches(PARQUET_ROWS, columns=[column])
            yield from enumerate(itertools.chain.from_iterable(batch.column(0) for batch in batches), start=1)
        except (arrow.ArrowException, OSError) as error:
            raise ValueError(f"source: {path} is truncated, damaged or not a parquet file ({error})") from None


def _row_text(value: Any, column: str) -> str:
    """Returns the text of a scalar of pyarrow."""
    try:
        return _string(value.as_py(), column)
    except UnicodeDecodeError as error:
        raise _BadRecordError("not UTF-8", f"text_field {column!r} is not UTF-8 ({error})") from None


def _string(value: Any, field: str) -> str:
    if not isinstance(value, str):
        kind = "null" if value is None else type(value).__name__
        raise _BadRecordError("not a string", f"text_field {field!r} must hold a string, got {kind}")
    return value


def _utf8(text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:  # a lone surrogate such as \ud800 is valid JSON but not text
        message = f"the text holds half of a surrogate pair at character {error.start}"
        raise _BadRecordError("not UTF-8", message) from None
