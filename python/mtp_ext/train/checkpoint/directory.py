"""Checkpoint directories: written whole or not at all, self-contained, the last k kept.

A checkpoint is `<run>/checkpoints/step-00000120/` with

- `model.safetensors`: the model's state dict,
- `state.pt`: optimisers, random generators, data order and progress (read with `weights_only=True`),
- `model.json`, `config.json`, `config.toml`, tokenizer files: enough to load the model elsewhere or to resume the run,
- `manifest.json`: the size of every other file, written last.

It is written under another name, synchronised to the disk and renamed, so that a directory with a checkpoint's name is
whole whatever ends the process; a directory copied in part fails its manifest and is not a checkpoint.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

MODEL_FILE = "model.safetensors"
STATE_FILE = "state.pt"
MANIFEST_FILE = "manifest.json"
FORMAT = 1

_NAME = re.compile(r"step-(\d{8,})")
_LEFTOVER = re.compile(r"\.(writing|removing)-.*")


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on the disk.

    Attributes:
        path: Its directory.
        step: Optimiser steps done when it was written.
        validation_loss: Head 1's validation loss (nats per token) measured at that step, or ``None``.
    """

    path: Path
    step: int
    validation_loss: float | None


def write_checkpoint(
    directory: Path,
    step: int,
    model_state: Mapping[str, Tensor],
    training_state: Mapping[str, Any],
    *,
    validation_loss: float | None = None,
    write_extra: Callable[[Path], None] | None = None,
) -> Checkpoint:
    """Writes the checkpoint of a step atomically and durably; a whole one of that step is kept as it is.

    Args:
        directory: The run's checkpoint directory; made if absent.
        step: Optimiser steps done.
        model_state: The model's state dict.
        training_state: Anything that ``torch.load(weights_only=True)`` reads.
        validation_loss: Head 1's validation loss at this step, if it was measured.
        write_extra: Called with the unfinished directory to add files (configuration, tokenizer).
    """
    directory.mkdir(parents=True, exist_ok=True)
    final = directory / f"step-{step:08d}"
    present = read_checkpoint(final)
    if present is not None:
        return present
    writing = directory / f".writing-{final.name}-{uuid.uuid4().hex[:8]}"
    writing.mkdir()
    try:
        save_file(_separate(model_state), writing / MODEL_FILE)
        torch.save(dict(training_state), writing / STATE_FILE)
        if write_extra is not None:
            write_extra(writing)
        files = {str(p.relative_to(writing)): p.stat().st_size for p in sorted(writing.rglob("*")) if p.is_file()}
        manifest = {"format": FORMAT, "step": step, "validation_loss": validation_loss, "files": files}
        (writing / MANIFEST_FILE).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        for path in (*writing.rglob("*"), writing):
            _synchronise(path)
        if final.exists():  # not whole, or it would have been kept
            _remove(final)
        os.rename(writing, final)
        _synchronise(directory)
    except BaseException:
        shutil.rmtree(writing, ignore_errors=True)
        raise
    return Checkpoint(final, step, validation_loss)


def read_checkpoint(path: Path) -> Checkpoint | None:
    """The checkpoint at ``path``, or ``None`` if it is absent or not whole."""
    try:
        manifest = json.loads((path / MANIFEST_FILE).read_text(encoding="utf-8"))
        whole = all((path / name).stat().st_size == size for name, size in manifest["files"].items())
        found = Checkpoint(path, int(manifest["step"]), manifest["validation_loss"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if whole else None


def list_checkpoints(directory: Path) -> list[Checkpoint]:
    """The whole checkpoints of a checkpoint directory, oldest first."""
    if not directory.is_dir():
        return []
    found = [read_checkpoint(path) for path in directory.iterdir() if _NAME.fullmatch(path.name)]
    return sorted((c for c in found if c is not None), key=lambda c: c.step)


def resolve_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint that a user means: a checkpoint's own directory, or a run's (its latest checkpoint).

    Raises:
        ValueError: There is no whole checkpoint at ``path``.
    """
    own = read_checkpoint(path)
    if own is not None:
        return own
    found = list_checkpoints(path / "checkpoints") or list_checkpoints(path)
    if not found:
        state = "has no whole checkpoint" if path.is_dir() else "does not exist"
        raise ValueError(f"checkpoint: expected the directory of a checkpoint or of a run, but {path} {state}")
    return found[-1]


def prune_checkpoints(directory: Path, keep_last: int, *, keep_best: bool) -> None:
    """Deletes all but the last ``keep_last`` checkpoints (and, if asked, the one of the lowest validation loss).

    What an earlier process left half written or half deleted goes too.
    """
    found = list_checkpoints(directory)
    keep = {c.path for c in found[-keep_last:]}
    measured = [c for c in found if c.validation_loss is not None]
    if keep_best and measured:
        keep.add(min(measured, key=lambda c: (c.validation_loss, -c.step)).path)
    for checkpoint in found:
        if checkpoint.path not in keep:
            _remove(checkpoint.path)
    for path in directory.iterdir():
        if _LEFTOVER.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


def load_model_state(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The model's state dict, on the CPU."""
    return load_file(checkpoint.path / MODEL_FILE)


def load_training_state(checkpoint: Checkpoint) -> dict[str, Any]:
    """Optimisers, generators, data order and progress, on the CPU."""
    state: dict[str, Any] = torch.load(checkpoint.path / STATE_FILE, map_location="cpu", weights_only=True)
    return state


def _separate(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous copies where tensors share memory (tied weights): safetensors refuses shared storage."""
    seen: set[int] = set()
    separate = {}
    for name, tensor in state.items():
        shared = tensor.untyped_storage().data_ptr() in seen
        seen.add(tensor.untyped_storage().data_ptr())
        separate[name] = tensor.detach().clone().contiguous() if shared else tensor.detach().contiguous()
    return separate


def _synchronise(path: Path) -> None:
    """Flushes a file or a directory entry to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    """Deletes a checkpoint under another name, so that a kill in between leaves no half checkpoint."""
    removing = path.with_name(f".removing-{path.name}-{uuid.uuid4().hex[:8]}")
    os.rename(path, removing)
    shutil.rmtree(removing, ignore_errors=True)
