"""Reads and writes configurations as TOML and JSON: every key is checked, and round trips are exact."""

from __future__ import annotations

import dataclasses
import difflib
import json
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import tomli_w

from mtp_ext.train.config import TrainConfig

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Section = TypeVar("Section")


def read_toml(path: Path, base: TrainConfig) -> TrainConfig:
    """Returns ``base`` overridden by a TOML file, whose sections are those of `TrainConfig`.

    Raises:
        ValueError: The file is missing or not valid TOML, or holds an unknown key or a value of the wrong type; the
            message names the key.
    """
    try:
        # Paths need not be UTF-8: their other bytes are kept as the operating system interface keeps them.
        text = path.read_text(encoding="utf-8", errors="surrogateescape")
        return override(base, tomllib.loads(text), str(path))
    except OSError as error:
        raise ValueError(f"config: cannot read {path}: {error.strerror}") from None
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"config: {path} is not valid TOML: {error}") from None


def override(base: Section, values: Mapping[str, Any], origin: str, prefix: str = "") -> Section:
    """Returns a dataclass instance with some of its fields replaced; nested mappings replace nested fields.

    Args:
        base: The values of all other fields.
        values: New values by field name.
        origin: The name of ``values`` in error messages.
        prefix: Name of the section within ``origin``, with a trailing dot.
    Raises:
        ValueError: An unknown key, a value of the wrong type, or one that the dataclass rejects.
    """
    hints = get_type_hints(type(base))
    known = [f.name for f in dataclasses.fields(base)]  # type: ignore[arg-type]
    changes = {}
    for key, value in values.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {prefix + near[0]!r}?" if near else f"known are {', '.join(known)}"
            raise ValueError(f"{origin}: unknown key {prefix + key!r}; {hint}")
        if dataclasses.is_dataclass(hints[key]):
            if not isinstance(value, Mapping):
                raise ValueError(f"{origin}: {prefix}{key} must be a section, got {value!r}")
            changes[key] = override(getattr(base, key), value, origin, f"{prefix}{key}.")
        else:
            changes[key] = _convert(value, hints[key], f"{origin}: {prefix}{key}")
    try:
        return dataclasses.replace(base, **changes)  # type: ignore[type-var]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{origin}: {error}") from None


def _convert(value: Any, hint: Any, name: str) -> Any:
    """Converts a JSON or TOML value to a field's type."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return _convert(value, next(a for a in arguments if a is not type(None)), name)
    if origin is Literal:
        if value in arguments:
            return value
        raise ValueError(f"{name} must be one of {', '.join(map(str, arguments))}, got {value!r}")
    if origin is tuple:
        if isinstance(value, (list, tuple)):
            return tuple(_convert(item, arguments[0], name) for item in value)
        if arguments[0] is str and isinstance(value, str):
            return (value,)
        raise ValueError(f"{name} must be a list, got {value!r}")
    if hint is Path and isinstance(value, str):
        return Path(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    expected = {str: "a string", int: "an integer", float: "a number", bool: "true or false", Path: "a path"}[hint]
    raise ValueError(f"{name} must be {expected}, got {value!r}")


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """Returns all fields as JSON values."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    return plain


def write_config(config: TrainConfig, directory: Path) -> None:
    """Writes `config.toml` (to read and to pass to `--config`) and `config.json` (for programs)."""
    values = to_dict(config)
    (directory / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    text = tomli_w.dumps(_without_none(values))
    (directory / "config.toml").write_text(text, encoding="utf-8", errors="surrogateescape")


def read_config(directory: Path) -> TrainConfig:
    """Reads a configuration written by `write_config`.

    Raises:
        ValueError: It is missing or damaged.
    """
    path = directory / "config.json"
    try:
        return override(TrainConfig(), json.loads(path.read_text(encoding="utf-8")), str(path))
    except OSError as error:
        raise ValueError(f"config: cannot read {path}: {error.strerror}") from None


def _without_none(values: dict[str, Any]) -> dict[str, Any]:
    """Drops ``None`` values: TOML has no null, and every field that allows ``None`` has it as its default."""
    kept = {key: value for key, value in values.items() if value is not None}
    return {key: _without_none(value) if isinstance(value, dict) else value for key, value in kept.items()}
