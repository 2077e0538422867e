"""One process per run directory: a lock, unique default names, nothing left behind by a start that fails."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from mtp_ext.train.checkpoint import resume
from mtp_ext.train.checkpoint.directory import list_checkpoints, read_checkpoint
from mtp_ext.train.checkpoint.resume import hold_run
from mtp_ext.train.config_file import read_config
from mtp_ext.train.data.sources import RUN_LOCK_FILE
from tests.train.processes import TrainingProcess, n_lines
from tests.train.tiny import run, tiny_config

MANY_STEPS = 100_000


@pytest.mark.slow
def test_a_second_process_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    """Also with ``--resume``, which would write the same checkpoints; a kill releases the lock."""
    directory = tmp_path / "run"
    first = TrainingProcess(tiny_config(tmp_path, max_steps=MANY_STEPS, seed=1))
    first.wait_for(lambda: n_lines(directory / "metrics.jsonl") >= 2)
    second = TrainingProcess(tiny_config(tmp_path, max_steps=2, seed=2))
    assert second.wait() == 2
    assert f"out: another process is training in {directory}; wait until it ends" in second.output
    assert read_config(directory).seed == 1
    first.process.kill()
    assert first.wait() == -signal.SIGKILL
    run(tiny_config(tmp_path, max_steps=2, seed=2))
    assert list_checkpoints(directory / "checkpoints")[-1].step == 2


def test_a_running_run_cannot_be_resumed(tmp_path: Path) -> None:
    outcome = run(tiny_config(tmp_path, max_steps=1))
    checkpoint = read_checkpoint(outcome.checkpoint)
    with hold_run(tmp_path / "run", checkpoint):
        with pytest.raises(ValueError, match="another process is training in"):
            run(tiny_config(tmp_path, max_steps=2), checkpoint)
        with pytest.raises(ValueError, match="another process is training in"), hold_run(None, checkpoint):
            pass
    run(tiny_config(tmp_path, max_steps=2), checkpoint)


def test_default_names_are_unique_within_a_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(resume.time, "strftime", lambda _: "20260101-000000")
    with hold_run(None, None) as first, hold_run(None, None) as second, hold_run(None, None) as third:
        names = [path.name for path in (first, second, third)]
    assert names == ["20260101-000000", "20260101-000000-2", "20260101-000000-3"]


def test_a_start_that_fails_leaves_no_directory(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    for file in (tmp_path / "corpus").iterdir():
        file.write_text("")
    with pytest.raises(ValueError, match="holds no text"):
        run(config)
    assert not (tmp_path / "run").exists()


def test_a_failure_in_a_directory_that_is_used_leaves_its_files(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), hold_run(tmp_path / "run", None) as directory:
        (directory / "notes").write_text("x")
        raise RuntimeError
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [RUN_LOCK_FILE, "notes"]


def test_a_path_that_is_no_directory_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match=rf"out: expected a directory that can be written, got {out}"):
            with hold_run(out, None):
                pass
