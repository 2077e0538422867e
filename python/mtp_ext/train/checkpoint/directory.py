"""Checkpoint directories: written atomically, self-contained, with the last k kept.

A checkpoint is `<run>/checkpoints/step-00000120/` with

- `model.safetensors`: the model's state dict,
- `state.pt`: optimisers, random generators, data order and progress (read with `weights_only=True`),
- `model.json`, `config.json`, `config.toml`, tokenizer files: enough to load the model elsewhere or to resume the run,
- `manifest.json`: the size and SHA-256 of every other file, and its own SHA-256; written last.

It is written under another name, synced to the disk and renamed, so that a directory with a checkpoint's name is
complete however the process ends; a partial copy does not match its manifest and is not a checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pickle
import re
import shutil
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, load_file, save_file
from torch import Tensor

from mtp_ext.train.data.shards import checksums, sha256_of

MODEL_FILE = "model.safetensors"
STATE_FILE = "state.pt"
MANIFEST_FILE = "manifest.json"
FORMAT = 2

_log = logging.getLogger(__name__)
_NAME = re.compile(r"step-(\d{8,})")
_LEFTOVER = re.compile(r"\.(writing|removing)-.*")


class DamagedCheckpointError(ValueError):
    """A file of a checkpoint is missing or not what was written."""


class CheckpointWriteError(RuntimeError):
    """A checkpoint cannot be written; nothing of it is left, and earlier ones are kept."""


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on the disk.

    Attributes:
        path: Its directory.
        step: Optimiser steps done when it was written.
        validation_loss: Head 1's validation loss (nats per token) measured at that step, or ``None``.
        written: When it was written, in seconds since the epoch.
    """

    path: Path
    step: int
    validation_loss: float | None
    written: float


def write_checkpoint(
    directory: Path,
    step: int,
    model_state: Mapping[str, Tensor],
    training_state: Mapping[str, Any],
    *,
    validation_loss: float | None = None,
    write_extra: Callable[[Path], None] | None = None,
) -> Checkpoint:
    """Writes the checkpoint of a step atomically and durably; an existing complete one is kept.

    Only one process may write to a directory at a time: what interrupted writes left there is deleted.

    Args:
        directory: The run's checkpoint directory; created if missing.
        step: Optimiser steps done.
        model_state: The model's state dict, whose tensors do not share memory.
        training_state: Anything that ``torch.load(weights_only=True)`` can read.
        validation_loss: Head 1's validation loss at this step, if measured.
        write_extra: Called with the unfinished directory to add files (configuration, tokenizer).
    Raises:
        CheckpointWriteError: The disk is full, or it cannot be written for another reason; nothing of it is left.
    """
    final = directory / f"step-{step:08d}"
    present = read_checkpoint(final)
    if present is not None and is_unchanged(present):
        return present
    writing = directory / f".writing-{final.name}-{uuid.uuid4().hex[:8]}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(directory)
        writing.mkdir()
        save_file({name: tensor.contiguous() for name, tensor in model_state.items()}, writing / MODEL_FILE)
        with (writing / STATE_FILE).open("wb") as file:  # torch itself opens only paths in UTF-8
            torch.save(dict(training_state), file)
        if write_extra is not None:
            write_extra(writing)
        checkpoint = Checkpoint(final, step, validation_loss, time.time())
        manifest: dict[str, Any] = {"format": FORMAT, "step": step, "validation_loss": validation_loss}
        manifest |= {"written": checkpoint.written, "files": checksums(writing)}
        manifest["sha256"] = _manifest_checksum(manifest)
        (writing / MANIFEST_FILE).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        for path in (*writing.rglob("*"), writing):
            _synchronise(path)
        if final.exists():  # incomplete, or it would have been kept
            _remove(final)
        os.rename(writing, final)
        _synchronise(directory)
    except BaseException as error:
        shutil.rmtree(writing, ignore_errors=True)
        if isinstance(error, (OSError, RuntimeError, SafetensorError)):
            raise CheckpointWriteError(f"checkpoint: cannot write {final}: {_why_not_written(error)}") from error
        raise
    return checkpoint


def read_checkpoint(path: Path) -> Checkpoint | None:
    """Returns the checkpoint at ``path``, or ``None`` if it is missing or incomplete; contents are not verified."""
    try:
        return _open(path)[0]
    except DamagedCheckpointError:
        return None


def verify_checkpoint(checkpoint: Checkpoint) -> None:
    """Compares every file of a checkpoint with the hash in its manifest; old manifests have sizes only.

    Raises:
        DamagedCheckpointError: A file is missing or changed.
    """
    for name in _open(checkpoint.path)[1]:
        _verify_file(checkpoint, name)


def is_unchanged(checkpoint: Checkpoint) -> bool:
    """Returns True if the files of a checkpoint are those that were written."""
    try:
        verify_checkpoint(checkpoint)
    except DamagedCheckpointError:
        return False
    return True


def last_good_checkpoint(directory: Path) -> Checkpoint | None:
    """Returns the last complete and unchanged checkpoint in a checkpoint directory; logs each that is skipped."""
    names = [path for path in directory.iterdir() if _NAME.fullmatch(path.name)] if directory.is_dir() else []
    for path in sorted(names, key=lambda path: int(path.name.removeprefix("step-")), reverse=True):
        try:
            checkpoint = _open(path)[0]
            verify_checkpoint(checkpoint)
            return checkpoint
        except DamagedCheckpointError as error:
            _log.warning("%s; skipped", error)
    return None


def set_aside(checkpoint: Checkpoint) -> None:
    """Renames a damaged checkpoint, so that it is no longer one of its run."""
    os.replace(checkpoint.path, checkpoint.path.with_name(f"damaged-{checkpoint.path.name}-{uuid.uuid4().hex[:8]}"))


def _open(path: Path) -> tuple[Checkpoint, dict[str, Any]]:
    """Returns the checkpoint at ``path`` and its files by name, after comparing their sizes."""
    try:
        manifest = json.loads((path / MANIFEST_FILE).read_text(encoding="utf-8"))
        files, checksum = manifest["files"], manifest.pop("sha256", None)
        if checksum is not None and checksum != _manifest_checksum(manifest):
            raise ValueError("its checksum differs")
        written = manifest.get("written") or (path / MANIFEST_FILE).stat().st_mtime
        checkpoint = Checkpoint(path, int(manifest["step"]), manifest["validation_loss"], written)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpointError(
            f"checkpoint: {path} is damaged: {MANIFEST_FILE} cannot be read ({error})"
        ) from None
    for name, entry in files.items():
        expected = entry["bytes"] if isinstance(entry, dict) else entry  # a size alone before format 2
        try:
            size = (path / name).stat().st_size
        except OSError:
            raise DamagedCheckpointError(f"checkpoint: {path} is damaged: {name} is missing") from None
        if size != expected:
            raise DamagedCheckpointError(f"checkpoint: {path} is damaged: {name} has {size} bytes, expected {expected}")
    return checkpoint, files


def _verify_file(checkpoint: Checkpoint, name: str) -> Path:
    """Returns the path of a file after comparing its hash."""
    path = checkpoint.path / name
    entry = _open(checkpoint.path)[1].get(name)
    if isinstance(entry, dict) and sha256_of(path) != entry["sha256"]:
        raise DamagedCheckpointError(
            f"checkpoint: {checkpoint.path} is damaged: the checksum of {name} differs from the manifest's"
        )
    return path


def _manifest_checksum(manifest: Mapping[str, Any]) -> str:
    """Returns the hash of a manifest without its own hash."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def list_checkpoints(directory: Path) -> list[Checkpoint]:
    """Returns the complete checkpoints in a checkpoint directory, oldest first."""
    if not directory.is_dir():
        return []
    found = [read_checkpoint(path) for path in directory.iterdir() if _NAME.fullmatch(path.name)]
    return sorted((c for c in found if c is not None), key=lambda c: c.step)


def resolve_checkpoint(path: Path) -> Checkpoint:
    """Returns the checkpoint at ``path``, the directory of a checkpoint or of a run (its latest checkpoint).

    Raises:
        ValueError: There is no complete checkpoint at ``path``, or the named one is damaged. Damaged ones of a run are
            skipped, and logged.
    """
    if path.is_dir() and ((path / MANIFEST_FILE).exists() or _NAME.fullmatch(path.name)):
        own = _open(path)[0]
        verify_checkpoint(own)
        return own
    found = last_good_checkpoint(path / "checkpoints") or last_good_checkpoint(path)
    if found is None:
        state = "has no complete checkpoint" if path.is_dir() else "does not exist"
        raise ValueError(f"checkpoint: expected the directory of a checkpoint or of a run, but {path} {state}")
    return found


def prune_checkpoints(directory: Path, keep_last: int, *, keep_best: bool) -> None:
    """Deletes all but the last ``keep_last`` checkpoints (and the one with the lowest validation loss, if asked).

    Also removes leftovers of interrupted writes and deletions.
    """
    found = list_checkpoints(directory)
    keep = {c.path for c in found[-keep_last:]}
    measured = [c for c in found if c.validation_loss is not None]
    if keep_best and measured:
        keep.add(min(measured, key=lambda c: (c.validation_loss, -c.step)).path)
    for checkpoint in found:
        if checkpoint.path not in keep:
            _remove(checkpoint.path)
    _remove_leftovers(directory)


def load_model_state(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Loads the model's state dict on the CPU.

    Raises:
        DamagedCheckpointError: The file is not what was written.
    """
    path = _verify_file(checkpoint, MODEL_FILE)
    try:
        if str(path).encode(errors="replace") != os.fsencode(path):  # load_file opens only paths in UTF-8
            return load(path.read_bytes())
        return load_file(path)
    except SafetensorError as error:
        raise DamagedCheckpointError(f"checkpoint: {path} cannot be read ({error})") from None


def load_training_state(checkpoint: Checkpoint) -> dict[str, Any]:
    """Loads optimisers, generators, data order and progress on the CPU.

    Raises:
        DamagedCheckpointError: The file is not what was written.
    """
    path = _verify_file(checkpoint, STATE_FILE)
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise DamagedCheckpointError(f"checkpoint: {path} cannot be read ({error})") from None
    return state


def _remove_leftovers(directory: Path) -> None:
    """Deletes what interrupted writes and deletions left, which may be all the space that the next write lacks."""
    for path in directory.iterdir():
        if _LEFTOVER.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


def _why_not_written(error: BaseException) -> str:
    """Returns the reason of a failed write in one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    message = " ".join(str(error).split())
    if "inline_container" in message:  # torch's archive writer, whose message is about positions in the file
        return f"the disk accepted only a part of the file; is it full? ({message[:80]})"
    return message


def _synchronise(path: Path) -> None:
    """Flushes a file or a directory entry to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    """Renames a checkpoint before deleting it, so that a kill in between leaves no partial checkpoint."""
    removing = path.with_name(f".removing-{path.name}-{uuid.uuid4().hex[:8]}")
    os.rename(path, removing)
    shutil.rmtree(removing, ignore_errors=True)
