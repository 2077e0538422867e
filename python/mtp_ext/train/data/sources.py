"""Where documents come from: directories, files, globs, JSON lines and the standard library's own source.

A document is a file or a JSON record. Its group is what the held-out split keeps together: the file, the top-level
package of the standard library, or the record's content (so that exact duplicates of a record stay on one side).
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

STDLIB = "stdlib"
# Tests are two thirds of the library's bytes, and many installations come without them; the other patterns are tables
# that a program wrote, which would flatter a validation loss.
STDLIB_TESTS = ("test/*", "*/test/*", "*/tests/*", "*/idle_test/*")
STDLIB_EXCLUDE = (*STDLIB_TESTS, "encodings/*", "pydoc_data/*", "_sysconfigdata*", "config-*/*")
SKIPPED_DIRECTORIES = frozenset({"__pycache__", "CVS", "node_modules", "site-packages", "dist-packages"})
RECORD_SUFFIXES = (".jsonl", ".ndjson")
BINARY_PROBE_BYTES = 8192  # as git does: a file with a NUL byte near its beginning is binary

OnSkip = Callable[[str, str], None]
"""Called with the reason and the name of a document that is left out."""


@dataclass(frozen=True)
class SourceFile:
    """A file to read.

    Attributes:
        path: Where it lies.
        name: What it is called in messages and in the split; does not depend on where its directory lies.
        relative: What patterns are matched with.
        group: What the split keeps together (unused for files of records).
    """

    path: Path
    name: str
    relative: str
    group: str


@dataclass(frozen=True)
class Document:
    """A text; ``data`` is its UTF-8 form."""

    name: str
    group: str
    text: str
    data: bytes


def find_files(
    source: Sequence[str], suffixes: Sequence[str], exclude: Sequence[str] | None = None
) -> list[SourceFile]:
    """Files that ``source`` names, each once, in an order that does not depend on the file system.

    Args:
        source: Directories, files, globs or ``"stdlib"``.
        suffixes: Suffixes of the files taken from directories, in any case.
        exclude: Patterns of relative paths to leave out; None means ``STDLIB_EXCLUDE`` for ``"stdlib"``, else nothing.
    Raises:
        ValueError: An entry matches nothing, or no file is left.
    """
    wanted = tuple(suffix.lower() for suffix in suffixes)
    found: dict[Path, SourceFile] = {}
    for entry in source:
        default = STDLIB_EXCLUDE if entry == STDLIB else ()
        patterns = default if exclude is None else exclude
        for file in _expand(entry, wanted):
            if not any(fnmatchcase(file.relative, pattern) for pattern in patterns):
                found.setdefault(file.path.resolve(), file)
    if not found:
        raise ValueError(
            f"source {', '.join(map(repr, source))} has no file to read: looked for the suffixes {' '.join(suffixes)}, "
            f"left out {' '.join(exclude) if exclude else 'nothing'}"
        )
    return list(found.values())


def read_documents(files: Iterable[SourceFile], text_field: str, on_skip: OnSkip) -> Iterator[Document]:
    """Documents of ``files`` in order; texts are kept to the byte (no newline is translated).

    Args:
        files: Files of text, or of JSON records by their suffix.
        text_field: Field of a record that holds its text.
        on_skip: Told of each binary, undecodable or empty document.
    Raises:
        ValueError: A JSON line is not an object with a text; the message names the file and the line.
    """
    for file in files:
        if file.path.suffix.lower() in RECORD_SUFFIXES:
            yield from _records(file, text_field, on_skip)
            continue
        data = file.path.read_bytes()
        if not data:
            on_skip("empty", file.name)
        elif b"\0" in data[:BINARY_PROBE_BYTES]:
            on_skip("binary", file.name)
        else:
            try:
                yield Document(file.name, file.group, data.decode("utf-8"), data)
            except UnicodeDecodeError:
                on_skip("not UTF-8", file.name)


def _expand(entry: str, suffixes: tuple[str, ...]) -> Iterator[SourceFile]:
    """The files of one entry of ``source``."""
    if entry == STDLIB:
        root = Path(sysconfig.get_path("stdlib"))
        for relative in _walk(root, (".py",)):
            package = relative.split("/", 1)[0].removesuffix(".py")
            yield SourceFile(root / relative, f"{STDLIB}/{relative}", relative, f"{STDLIB}/{package}")
        return
    pattern = os.path.expanduser(entry)
    matches = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
    if not matches:
        raise ValueError(f"source {entry!r} is no file or directory and matches none")
    for match in map(Path, matches):
        if match.is_dir():
            for relative in _walk(match, suffixes):
                name = f"{match.resolve().name}/{relative}"
                yield SourceFile(match / relative, name, relative, name)
        elif match.is_file():
            yield SourceFile(match, match.as_posix(), match.as_posix(), match.as_posix())


def _walk(root: Path, suffixes: tuple[str, ...]) -> Iterator[str]:
    """Sorted relative paths of the files below ``root``, without hidden, version-control and foreign directories."""
    for directory, subdirectories, names in os.walk(root):
        if "pyvenv.cfg" in names and Path(directory) != root:  # a virtual environment: other people's code
            subdirectories.clear()
            continue
        subdirectories[:] = sorted(d for d in subdirectories if d[0] != "." and d not in SKIPPED_DIRECTORIES)
        for name in sorted(names):
            path = Path(directory, name)
            if name[0] != "." and name.lower().endswith(suffixes) and path.is_file():
                yield path.relative_to(root).as_posix()


def _records(file: SourceFile, text_field: str, on_skip: OnSkip) -> Iterator[Document]:
    """The documents of a file of JSON lines; blank lines are allowed."""
    with file.path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            name = f"{file.name}:{number}"
            text = _record_text(line, text_field, f"{file.path}, line {number}")
            data = _utf8(text, f"{file.path}, line {number}")
            if not data:
                on_skip("empty", name)
                continue
            yield Document(name, hashlib.blake2b(data, digest_size=16).hexdigest(), text, data)


def _record_text(line: bytes, text_field: str, where: str) -> str:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # both decoders raise subclasses of ValueError
        raise ValueError(f"{where}: expected a JSON object in UTF-8, got {line[:60]!r} ({error})") from None
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected a JSON object, got {line[:60]!r}")
    if text_field not in record:
        raise ValueError(
            f"{where}: text_field {text_field!r} is missing; the fields are {', '.join(map(repr, record))}"
        )
    text = record[text_field]
    if not isinstance(text, str):
        raise ValueError(f"{where}: text_field {text_field!r} must hold a string, got {type(text).__name__}")
    return text


def _utf8(text: str, where: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON's \ud800 alone: a string, but no text
        raise ValueError(f"{where}: the text holds half of a surrogate pair at character {error.start}") from None
