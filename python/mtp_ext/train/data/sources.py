"""Document sources: directories, files, globs, JSON lines and the standard library's source.

A document is a file or a JSON record. The held-out split keeps documents of one group together: the file, the top-level
package of the standard library, or the record's content (so that exact duplicates of a record stay on one side).
"""

from __future__ import annotations

import glob
import hashlib
import itertools
import json
import logging
import os
import stat
import sysconfig
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

STDLIB = "stdlib"
# Tests are two thirds of the library's bytes, and many installations lack them; the other patterns are generated
# tables, which would flatter the validation loss.
STDLIB_TESTS = ("test/*", "*/test/*", "*/tests/*", "*/idle_test/*")
STDLIB_EXCLUDE = (*STDLIB_TESTS, "encodings/*", "pydoc_data/*", "_sysconfigdata*", "config-*/*")
SKIPPED_DIRECTORIES = frozenset({"__pycache__", "CVS", "node_modules", "site-packages", "dist-packages"})
RUN_LOCK_FILE = ".run.lock"
# What a directory holds that training wrote; such directories below a source are no text to train on.
OUTPUT_FILES = tuple(
    frozenset(files.split())
    for files in (RUN_LOCK_FILE, "config.toml metrics.jsonl", "manifest.json model.safetensors", "train-documents.npy")
)
RECORD_SUFFIXES = (".jsonl", ".ndjson")
BINARY_PROBE_BYTES = 8192  # like git: a file with a NUL byte near its beginning is binary

_log = logging.getLogger(__name__)

OnSkip = Callable[[str, str], None]
"""Called with the reason and the name of a skipped document."""


@dataclass(frozen=True)
class SourceFile:
    """A file to read.

    Attributes:
        path: Its path.
        name: Its name in messages and in the split; independent of the location of its directory.
        relative: The relative path that patterns are matched against.
        group: Its group in the split (unused for files of records).
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
    """Finds the files of ``source``, each once, in an order independent of the file system.

    Args:
        source: Directories, files, globs or ``"stdlib"``.
        suffixes: Suffixes of the files taken from directories, case-insensitive.
        exclude: Patterns of relative paths to exclude; None means ``STDLIB_EXCLUDE`` for ``"stdlib"``, else nothing.
    Raises:
        ValueError: An entry matches nothing, or no file is left.
    """
    wanted = tuple(suffix.lower() for suffix in suffixes)
    found: dict[Path, SourceFile] = {}
    for entry in source:
        default = STDLIB_EXCLUDE if entry == STDLIB else ()
        patterns = default if exclude is None else exclude
        for file in _expand(entry, wanted, patterns):
            if not any(fnmatchcase(file.relative, pattern) for pattern in patterns):
                found.setdefault(file.path.resolve(), file)
    if not found:
        raise ValueError(
            f"source {', '.join(map(repr, source))} has no file to read: looked for the suffixes {' '.join(suffixes)}, "
            f"left out {' '.join(exclude) if exclude else 'nothing'}"
        )
    return list(found.values())


def read_documents(files: Iterable[SourceFile], text_field: str, on_skip: OnSkip) -> Iterator[Document]:
    """Yields the documents of ``files`` in order, without newline translation.

    Args:
        files: Text files, or files of JSON records by their suffix.
        text_field: Field of a record that holds its text.
        on_skip: Called for each binary, undecodable or empty document.
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


def _expand(entry: str, suffixes: tuple[str, ...], patterns: Sequence[str]) -> Iterator[SourceFile]:
    """Yields the files of one entry of ``source``; ``patterns`` excuse directories that cannot be read."""
    if entry == STDLIB:
        root = Path(sysconfig.get_path("stdlib"))
        for relative in _walk(root, (".py",), patterns):
            package = relative.split("/", 1)[0].removesuffix(".py")
            yield SourceFile(root / relative, f"{STDLIB}/{relative}", relative, f"{STDLIB}/{package}")
        return
    pattern = os.path.expanduser(entry)
    matches = [Path(pattern)] if os.path.exists(pattern) else _glob(pattern, patterns)
    if not matches:
        raise ValueError(f"source {entry!r} is not a file or directory and matches none")
    for match in matches:
        if match.is_dir():
            for relative in _walk(match, suffixes, patterns):
                name = f"{match.resolve().name}/{relative}"
                yield SourceFile(match / relative, name, relative, name)
        elif match.is_file():
            yield SourceFile(match, match.as_posix(), match.as_posix(), match.as_posix())


def _glob(pattern: str, excluded: Sequence[str]) -> list[Path]:
    """Returns the sorted matches of a glob that are not the output of training; ``**`` runs into no loop of links."""
    parts = Path(pattern).parts
    root = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), parts))
    wanted = parts[len(root.parts) :]
    if "**" not in wanted:
        matches = map(Path, sorted(glob.glob(pattern)))
        return [match for match in matches if not (match.is_dir() and _is_output(match.name, os.listdir(match)))]
    hidden = any(part[0] == "." for part in wanted)
    found = []
    for directory, names in _directories(root, excluded, lambda name: hidden or name[0] != "."):
        paths = [directory / name for name in names] + [directory] * (directory != root)
        found += [path for path in paths if _matches(path.relative_to(root).parts, wanted)]
    return sorted(found, key=str)


def _matches(names: Sequence[str], parts: Sequence[str]) -> bool:
    """Returns True if the components of a path match those of a glob, as in `glob.glob(recursive=True)`."""
    if not parts or not names:
        return not names and all(part == "**" for part in parts)
    is_hidden = names[0][0] == "."
    if parts[0] == "**":
        return _matches(names, parts[1:]) or (not is_hidden and _matches(names[1:], parts))
    matches = fnmatchcase(names[0], parts[0]) and (not is_hidden or parts[0][0] == ".")
    return matches and _matches(names[1:], parts[1:])


def _walk(root: Path, suffixes: tuple[str, ...], excluded: Sequence[str]) -> Iterator[str]:
    """Yields the sorted relative paths of files below ``root``, without hidden and third-party directories and the
    output of training."""
    environments: list[Path] = []  # virtual environments hold other people's code
    for directory, names in _directories(root, excluded, lambda n: n[0] != "." and n not in SKIPPED_DIRECTORIES):
        if "pyvenv.cfg" in names and directory != root:
            environments.append(directory)
        if any(environment == directory or environment in directory.parents for environment in environments):
            continue
        for name in names:
            if name[0] != "." and name.lower().endswith(suffixes) and _is_file(directory / name):
                yield (directory / name).relative_to(root).as_posix()


def _directories(
    root: Path, excluded: Sequence[str], enters: Callable[[str], bool]
) -> Iterator[tuple[Path, list[str]]]:
    """Yields ``root`` and the directories below it with their sorted file names; skips the output of training.

    Links are followed after all else, and no directory is visited twice.

    Args:
        root: Where to start.
        excluded: Patterns of relative paths; directories that they match may be unreadable.
        enters: Decides by the name of a subdirectory.
    Raises:
        ValueError: A directory cannot be read.
    """

    def refuse(error: OSError) -> None:
        relative = os.path.relpath(error.filename, root)
        if not any(fnmatchcase(f"{relative}/", pattern) for pattern in excluded):
            raise ValueError(
                f"source: cannot read {error.filename} ({error.strerror}); make it readable, or leave it out with "
                f"data.exclude '{relative}/*'"
            ) from None

    seen: set[tuple[int, int]] = set()
    starts = deque([root])
    while starts:
        for directory, subdirectories, names in os.walk(starts.popleft(), onerror=refuse):
            path, status = Path(directory), os.stat(directory)
            identity = (status.st_dev, status.st_ino)
            if identity in seen or (path != root and _is_output(path.name, [*names, *subdirectories])):
                subdirectories.clear()
                continue
            seen.add(identity)
            subdirectories[:] = sorted(filter(enters, subdirectories))
            starts.extend(link for name in subdirectories if (link := path / name).is_symlink())
            yield path, sorted(names)


def _is_file(path: Path) -> bool:
    """Returns True for a regular file; logs a link to nothing."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except FileNotFoundError:
        _log.warning("left out of the corpus: %s is a link to nothing", path)
        return False
    except OSError as error:
        raise ValueError(f"source: cannot read {path} ({error.strerror})") from None


def _is_output(name: str, entries: Sequence[str]) -> bool:
    """Returns True for a directory that training wrote: a run, a checkpoint, or a tokenised corpus."""
    return any(files.issubset(entries) for files in OUTPUT_FILES) or (".partial-" in name and "tokenizer" in entries)


def _records(file: SourceFile, text_field: str, on_skip: OnSkip) -> Iterator[Document]:
    """Yields the documents of a file of JSON lines; blank lines are allowed."""
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
    except UnicodeEncodeError as error:  # a lone surrogate such as \ud800 is valid JSON but not text
        raise ValueError(f"{where}: the text holds half of a surrogate pair at character {error.start}") from None
