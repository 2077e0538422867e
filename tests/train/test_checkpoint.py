"""A checkpoint is whole or it is none."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from mtp_ext.nn import MTPConfig, MTPModel
from mtp_ext.train.checkpoint import directory as module
from mtp_ext.train.checkpoint.directory import (
    MANIFEST_FILE,
    MODEL_FILE,
    STATE_FILE,
    CheckpointWriteError,
    DamagedCheckpointError,
    list_checkpoints,
    load_model_state,
    load_training_state,
    prune_checkpoints,
    read_checkpoint,
    resolve_checkpoint,
    write_checkpoint,
)


def write(directory: Path, step: int, loss: float | None = None) -> Path:
    weights = {"w": torch.full((2, 3), float(step))}
    return write_checkpoint(directory, step, weights, {"step": step}, validation_loss=loss).path


def test_it_reads_back_what_was_written(tmp_path: Path) -> None:
    state: dict[str, Any] = {"rng": torch.get_rng_state(), "progress": {"step": 3, "seconds": 1.5}, "list": [1, "a"]}
    weights = {"w": torch.randn(3, 4).T, "b": torch.randn(2, dtype=torch.float64)}

    def write_note(directory: Path) -> None:
        (directory / "note").write_text("x")

    written = write_checkpoint(tmp_path, 3, weights, state, validation_loss=2.5, write_extra=write_note)
    assert (read := read_checkpoint(written.path)) == written
    assert read is not None and (read.step, read.validation_loss) == (3, 2.5)
    loaded = load_model_state(written)
    assert loaded.keys() == weights.keys() and all(torch.equal(loaded[k], weights[k]) for k in weights)
    assert torch.equal(load_training_state(written).pop("rng"), state["rng"])
    assert (written.path / "note").read_text() == "x"


def test_tied_weights_are_written_under_both_names(tmp_path: Path) -> None:
    model = MTPModel(MTPConfig(vocab_size=9, d_model=4, n_layers=2, n_attn_heads=1, n_future=1, tie_embeddings=True))
    loaded = load_model_state(write_checkpoint(tmp_path, 1, model.state_dict(), {}))
    assert torch.equal(loaded["embed.weight"], model.embed.weight)
    assert torch.equal(loaded["unembed.weight"], model.embed.weight)


@pytest.mark.parametrize("name", [MODEL_FILE, STATE_FILE, MANIFEST_FILE])
@pytest.mark.parametrize("damage", ["absent", "short"])
def test_a_damaged_one_is_ignored(tmp_path: Path, name: str, damage: str) -> None:
    write(tmp_path, 1)
    file = write(tmp_path, 2) / name
    if damage == "absent":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[: -1 if name != MANIFEST_FILE else -10])
    assert [c.step for c in list_checkpoints(tmp_path)] == [1]
    assert resolve_checkpoint(tmp_path).step == 1


@pytest.mark.parametrize("stage", ["save_file", "_synchronise"])
def test_a_failure_while_writing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    write(tmp_path, 1)

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(module, stage, fail)
    with pytest.raises(CheckpointWriteError, match=rf"checkpoint: cannot write {tmp_path}/step-00000002: .*disk full"):
        write(tmp_path, 2)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), r"step-00000002: No space left on device$"),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "x"), r"step-00000002: Disk quota exceeded$"),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 128 vs 64"), "is it full"),
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), "No space left"),
    ],
)
@pytest.mark.parametrize("stage", ["save_file", "save", "mkdir"])
def test_a_full_disk_keeps_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, error: Exception, message: str
) -> None:
    write(tmp_path, 1)

    def write_a_part_and_fail(*arguments: Any, **_: object) -> None:
        if stage != "mkdir":
            target = arguments[1]  # a path, or an open file
            Path(target if isinstance(target, Path) else target.name).write_bytes(b"part")
        raise error

    owner = {"save_file": module, "save": module.torch, "mkdir": Path}[stage]
    monkeypatch.setattr(owner, stage, write_a_part_and_fail)
    with pytest.raises(CheckpointWriteError, match=message):
        write(tmp_path, 2)
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    assert resolve_checkpoint(tmp_path).step == 1
    assert write(tmp_path, 2).name == "step-00000002"


def test_leftovers_make_room_before_a_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 1)
    (tmp_path / ".writing-step-00000002-ab").mkdir()
    (tmp_path / ".writing-step-00000002-ab" / MODEL_FILE).write_bytes(b"x")
    save_file = module.save_file

    def check(*arguments: Any) -> None:
        assert not (tmp_path / ".writing-step-00000002-ab").exists()
        save_file(*arguments)

    monkeypatch.setattr(module, "save_file", check)
    write(tmp_path, 2)


def test_everything_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rename that overtakes the data leaves an empty checkpoint after a power cut."""
    events: list[str] = []
    rename = os.rename

    def record_rename(old: Path, new: Path) -> None:
        events.append("rename")
        rename(old, new)

    monkeypatch.setattr(module, "_synchronise", lambda path: events.append(path.name))
    monkeypatch.setattr(os, "rename", record_rename)
    path = write(tmp_path, 1)
    before = events[: events.index("rename")]
    assert {p.name for p in path.iterdir()} <= set(before)
    assert events[events.index("rename") + 1 :] == [tmp_path.name]


def test_the_same_step_is_kept_as_it_is(tmp_path: Path) -> None:
    first = write(tmp_path, 1)
    write_checkpoint(tmp_path, 1, {"w": torch.zeros(1)}, {})
    assert load_model_state(resolve_checkpoint(first))["w"].shape == (2, 3)


def test_a_damaged_one_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    (write(tmp_path, 1) / MODEL_FILE).unlink()
    assert read_checkpoint(write(tmp_path, 1)) is not None


def test_the_last_are_kept(tmp_path: Path) -> None:
    for step in (8, 16, 120, 99_999_999, 100_000_000):
        write(tmp_path, step)
    prune_checkpoints(tmp_path, 3, keep_best=False)
    assert [c.step for c in list_checkpoints(tmp_path)] == [120, 99_999_999, 100_000_000]


def test_the_best_is_kept_beside_the_last(tmp_path: Path) -> None:
    for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, None), (5, 1.5)):
        write(tmp_path, step, loss)
    prune_checkpoints(tmp_path, 1, keep_best=True)
    assert [c.step for c in list_checkpoints(tmp_path)] == [2, 5]


def test_leftovers_are_cleared_and_other_files_are_not(tmp_path: Path) -> None:
    write(tmp_path, 1)
    for name in (".writing-step-00000002-ab", ".removing-step-00000000-cd"):
        (tmp_path / name).mkdir()
        (tmp_path / name / MODEL_FILE).write_bytes(b"x")
    (tmp_path / "mine").mkdir()
    prune_checkpoints(tmp_path, 1, keep_best=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "step-00000001"]


def test_a_run_means_its_latest_checkpoint(tmp_path: Path) -> None:
    for step in (1, 2):
        write(tmp_path / "checkpoints", step)
    assert resolve_checkpoint(tmp_path).step == 2
    assert resolve_checkpoint(tmp_path / "checkpoints" / "step-00000001").step == 1


def test_no_checkpoint_is_an_error_that_names_the_path(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere does not exist"):
        resolve_checkpoint(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"has no complete checkpoint"):
        resolve_checkpoint(tmp_path)


def forget_hashes(path: Path) -> None:
    """Rewrites a manifest as version 0.1.0 wrote it, with the sizes that the files have."""
    manifest = json.loads((path / MANIFEST_FILE).read_text())
    files = {file: (path / file).stat().st_size for file in manifest["files"]}
    old = {"format": 1, "step": manifest["step"], "validation_loss": None, "files": files}
    (path / MANIFEST_FILE).write_text(json.dumps(old))


def flip_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("name", [MODEL_FILE, STATE_FILE, MANIFEST_FILE, "note"])
def test_a_changed_bit_is_an_error_when_named_and_a_line_when_skipped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    write(tmp_path, 1)
    damaged = write_checkpoint(
        tmp_path, 2, {"w": torch.ones(9)}, {"step": 2}, write_extra=lambda d: (d / "note").write_text("x") and None
    ).path
    flip_a_bit(damaged / name)
    with pytest.raises(DamagedCheckpointError, match=rf"checkpoint: {damaged} is damaged: .*{name}"):
        resolve_checkpoint(damaged)
    assert resolve_checkpoint(tmp_path).step == 1
    (line,) = caplog.messages
    assert line.startswith(f"checkpoint: {damaged} is damaged: ") and line.endswith("; skipped")


@pytest.mark.parametrize("load", [load_model_state, load_training_state])
def test_loading_verifies_the_file(tmp_path: Path, load: Any) -> None:
    checkpoint = read_checkpoint(write(tmp_path, 1))
    assert checkpoint is not None
    for name in (MODEL_FILE, STATE_FILE):
        flip_a_bit(checkpoint.path / name)
    with pytest.raises(DamagedCheckpointError, match="checksum of"):
        load(checkpoint)


@pytest.mark.parametrize(("name", "load"), [(MODEL_FILE, load_model_state), (STATE_FILE, load_training_state)])
def test_a_checkpoint_without_hashes_is_read_or_named(tmp_path: Path, name: str, load: Any) -> None:
    """As version 0.1.0 wrote it, with sizes alone."""
    path = write(tmp_path, 3)
    forget_hashes(path)
    checkpoint = resolve_checkpoint(tmp_path)
    load(checkpoint)
    (path / name).write_bytes(b"\xff" * (path / name).stat().st_size)
    with pytest.raises(DamagedCheckpointError, match=rf"{name} cannot be read"):
        load(checkpoint)


def test_a_damaged_checkpoint_of_the_same_step_is_written_again(tmp_path: Path) -> None:
    flip_a_bit(write(tmp_path, 1) / MODEL_FILE)
    assert torch.equal(load_model_state(read_checkpoint(write(tmp_path, 1)))["w"], torch.ones(2, 3))  # type: ignore[arg-type]
