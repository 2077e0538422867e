"""Source files: found in directories, by globs or by name, and in the standard library; named alike wherever they are.

Names identify a corpus and decide its split. So that a corpus may be moved, a file's name is what its entry is called
(`source_names`) and the path from there.
"""

from __future__ import annotations

import glob
import itertools
import logging
import os
import stat
import sysconfig
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

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
COMPRESSED = (".gz", ".zst")
NOT_FILES = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}

_log = logging.getLogger(__name__)


class MissingSourceError(ValueError):
    """There is nothing to read where the source should be."""


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


def plain_name(name: str) -> str:
    """Returns the name of a file in lower case, without the suffix of a compression."""
    stem, suffix = os.path.splitext(name.lower())
    return stem if suffix in COMPRESSED else stem + suffix


def located(source: Sequence[str], directory: str) -> tuple[str, ...]:
    """Returns the entries of ``source`` as paths from ``directory``; "" is the current one."""
    return tuple(e if e == STDLIB else os.path.join(directory, os.path.expanduser(e)) for e in source)


def source_names(source: Sequence[str]) -> list[str]:
    """Returns what each entry is called: a directory by its own name, a file by its path as it was given, and a glob
    by the path of the directory that it searches."""
    names = []
    for entry in source:
        path = Path(os.path.expanduser(entry))
        if entry == STDLIB:
            names.append(STDLIB)
        elif os.path.exists(path):
            names.append(path.resolve().name if path.is_dir() else path.as_posix())
        else:
            names.append(_glob_root(path).as_posix())
    return names


def find_files(
    source: Sequence[str],
    suffixes: Sequence[str],
    exclude: Sequence[str] | None = None,
    names: Sequence[str] | None = None,
) -> list[SourceFile]:
    """Finds the files of ``source``, each once, in an order independent of the file system.

    Args:
        source: Directories, files, globs or ``"stdlib"``.
        suffixes: Suffixes of the files taken from directories, case-insensitive.
        exclude: Patterns of relative paths to exclude; None means ``STDLIB_EXCLUDE`` for ``"stdlib"``, else nothing.
        names: What each entry is called; None takes `source_names`.
    Raises:
        MissingSourceError: An entry matches nothing, or no file is left.
        ValueError: A directory cannot be read, or a source is a pipe, a socket or a device.
    """
    wanted = tuple(suffix.lower() for suffix in suffixes)
    found: dict[Path, SourceFile] = {}
    for entry, called in zip(source, names or source_names(source), strict=True):
        default = STDLIB_EXCLUDE if entry == STDLIB else ()
        patterns = default if exclude is None else exclude
        for file in _expand(entry, called, wanted, patterns):
            if not any(fnmatchcase(file.relative, pattern) for pattern in patterns) and _is_file(file):
                found.setdefault(file.path.resolve(), file)
    if not found:
        raise MissingSourceError(
            f"source {', '.join(map(repr, source))} has no file to read: looked for the suffixes {' '.join(suffixes)}, "
            f"left out {' '.join(exclude) if exclude else 'nothing'}"
        )
    return list(found.values())


def _expand(entry: str, called: str, suffixes: tuple[str, ...], patterns: Sequence[str]) -> Iterator[SourceFile]:
    """Yields the files of one entry of ``source``; ``patterns`` excuse directories that cannot be read."""
    if entry == STDLIB:
        root = Path(sysconfig.get_path("stdlib"))
        for relative in _walk(root, (".py",), patterns):
            package = relative.split("/", 1)[0].removesuffix(".py")
            yield SourceFile(root / relative, f"{STDLIB}/{relative}", relative, f"{STDLIB}/{package}")
        return
    path = Path(os.path.expanduser(entry))
    matches = [path] if os.path.exists(path) else _glob(os.path.expanduser(entry), patterns)
    if not matches:
        raise MissingSourceError(f"source {entry!r} is not a file or directory and matches none")
    for match in matches:
        if match.is_dir():
            directory = called if match == path else match.resolve().name
            for relative in _walk(match, suffixes, patterns):
                name = f"{directory}/{relative}"
                yield SourceFile(match / relative, name, relative, name)
        else:
            name = called if match == path else (PurePosixPath(called) / match.relative_to(_glob_root(path))).as_posix()
            yield SourceFile(match, name, name, name)


def _glob_root(path: Path) -> Path:
    """Returns the directory that a glob searches."""
    return Path(*itertools.takewhile(lambda part: not glob.has_magic(part), path.parts))


def _glob(pattern: str, excluded: Sequence[str]) -> list[Path]:
    """Returns the sorted matches of a glob that are not the output of training; ``**`` runs into no loop of links."""
    parts = Path(pattern).parts
    root = _glob_root(Path(pattern))
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
            if name[0] != "." and (name.lower().endswith(suffixes) or plain_name(name).endswith(suffixes)):
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


def _is_file(file: SourceFile) -> bool:
    """Returns True for a regular file; logs a link to nothing.

    Raises:
        ValueError: It is a pipe, a socket or a device, or cannot be looked at.
    """
    try:
        kind = NOT_FILES.get(stat.S_IFMT(file.path.stat().st_mode))
    except FileNotFoundError:
        _log.warning("left out of the corpus: %s is a link to nothing", file.path)
        return False
    except OSError as error:
        raise ValueError(f"source: cannot read {file.path} ({error.strerror})") from None
    if kind is not None:
        raise ValueError(
            f"source: {file.path} is {kind}, expected a file, because documents are read more than once; write them to "
            f"a file, or leave it out with data.exclude '{file.relative}'"
        )
    return True


def _is_output(name: str, entries: Sequence[str]) -> bool:
    """Returns True for a directory that training wrote: a run, a checkpoint, or a tokenised corpus."""
    return any(files.issubset(entries) for files in OUTPUT_FILES) or (".partial-" in name and "tokenizer" in entries)
