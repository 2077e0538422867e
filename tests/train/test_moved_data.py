"""A run goes on wherever its data is: its sources moved, the run moved, or only the tokens in the cache left."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from mtp_ext.cli.main import main
from mtp_ext.train.checkpoint.directory import list_checkpoints
from mtp_ext.train.config import ScheduleConfig
from mtp_ext.train.data import DataConfig, HuggingFaceTokenizer, prepare, prepare_data
from mtp_ext.train.data.tokenizer import learn_bpe
from mtp_ext.train.report.record import read_metrics
from tests.train.tiny import run, tiny_config, write_corpus

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory that runs start in; the current one."""
    directory = tmp_path / "home"
    write_corpus(directory / "corpus")
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(directory)
    return directory


def start(*source: str, tokenizer: str = "bytes", whole: bool = True) -> None:
    """Takes two steps of a run, with relative paths; ``whole`` is the same run with four."""
    config = tiny_config(Path(), schedule=ScheduleConfig(warmup_steps=0, decay_ratio=1.0))  # whatever the limit
    data = dataclasses.replace(config.data, source=source or ("corpus",), tokenizer=tokenizer)
    config = dataclasses.replace(config, data=data)
    if whole:
        run(dataclasses.replace(config, out=Path("whole")))
    run(dataclasses.replace(config, max_steps=2))


def resume(directory: Path, *options: str, steps: int = 4) -> int:
    return main(["train", "--resume", str(directory), "--max-steps", str(steps), *options])


def losses(directory: Path) -> dict[int, Any]:
    records = read_metrics(directory / "metrics.jsonl")
    return {record["step"]: record["head_loss"] for record in records if record["kind"] == "train"}


def inputs(directory: Path) -> dict[str, Any]:
    """What the last checkpoint says of its corpus."""
    path = list_checkpoints(directory / "checkpoints")[-1].path / "dataset.json"
    recorded: dict[str, Any] = json.loads(path.read_text())["inputs"]
    return recorded


def test_a_run_resumes_from_another_directory(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start()
    monkeypatch.chdir(home.parent / "other")
    assert resume(home / "run") == 0
    assert losses(home / "run") == losses(home / "whole")
    assert [path.name for path in (home.parent / "other").iterdir()] == []
    assert main(["evaluate", "--checkpoint", str(home / "run")]) == 0


def test_the_place_of_the_run_comes_before_the_current_one(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other directories have a `corpus` too, and each is tried."""
    start()
    other = home.parent / "other"
    monkeypatch.chdir(other)
    write_corpus(Path("corpus"), seed=1)
    assert resume(home / "run", steps=3) == 0
    (home / "corpus").rename(home / "right")
    write_corpus(home / "corpus", seed=2)
    shutil.rmtree("corpus")
    shutil.copytree(home / "right", "corpus")
    assert resume(home / "run") == 0
    assert losses(home / "run") == losses(home / "whole")
    assert inputs(home / "run")["directory"] == str(other)


@pytest.mark.parametrize(
    ("before", "moved", "after"),
    [
        (["corpus"], "renamed", ["{other}/renamed"]),
        (["corpus"], "renamed", ["../other/renamed"]),
        (["."], "corpus", ["{other}"]),
        (["corpus/*.py"], "renamed", ["{other}/renamed/*.py"]),
        (["corpus/*.py"], "renamed", ["{other}/renamed"]),
        (["**/module_*.py"], "corpus", ["{other}/**/module_*.py"]),
        (["corpus/module_0.py", "corpus/m*.py"], "renamed", ["{other}/renamed/module_0.py", "../other/renamed/m*"]),
    ],
)
def test_sources_may_move(home: Path, before: list[str], moved: str, after: list[str]) -> None:
    """What an entry names may be renamed; what is below it moves along. The second resume knows the new place, without
    the cache too."""
    start(*before)
    (home / "corpus").rename(home.parent / "other" / moved)
    source = [entry.format(other=home.parent / "other") for entry in after]
    assert resume(home / "run", "--data.source", *source, steps=3) == 0
    shutil.rmtree(home / "cache")
    assert resume(home / "run") == 0
    assert losses(home / "run") == losses(home / "whole")
    assert inputs(home / "run")["source"] == source
    assert inputs(home / "run")["names"] == inputs(home / "whole")["names"]


CHANGES: dict[str, Callable[[Path], object]] = {
    "edited": lambda file: file.write_text(file.read_text() + "# one more line\n"),
    "same size": lambda file: file.write_text(file.read_text().replace("total", "count")),
    "renamed": lambda file: file.rename(file.with_name("new.py")),
    "removed": lambda file: file.unlink(),
    "added": lambda file: file.with_name("new.py").write_text("new"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_content_is_refused_before_it_is_tokenised(
    home: Path, capsys: pytest.CaptureFixture[str], change: str
) -> None:
    start(whole=False)
    moved = home.parent / "other" / "corpus"
    shutil.copytree("corpus", moved)
    CHANGES[change](moved / "module_0.py")
    cached = sorted(Path("cache").iterdir())
    assert resume(Path("run"), "--data.source", str(moved)) == 2
    message = capsys.readouterr().err
    assert f"cannot find the corpus of run/checkpoints/step-00000002: {moved} holds " in message
    assert f"changed, added, removed or renamed (their tokens are still in {home / cached[0]})" in message
    assert sorted(Path("cache").iterdir()) == cached
    assert resume(Path("run")) == 0


def test_another_number_of_sources_is_refused(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start("corpus/module_0.py", "corpus", whole=False)
    assert resume(Path("run"), "--data.source", "corpus") == 2
    assert "expected 2 sources for corpus/module_0.py, corpus, got corpus; restore it" in capsys.readouterr().err


@pytest.mark.parametrize("source", ["corpus", "corpus/*.py", "corpus/module_0.py corpus/module_1.py"])
def test_the_tokens_in_the_cache_are_enough(
    home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, source: str
) -> None:
    start(*source.split())
    for file in sorted(Path("corpus").iterdir())[1:]:
        file.unlink()
    shutil.rmtree("corpus")
    monkeypatch.chdir(home.parent / "other")
    assert resume(home / "run", steps=3) == 0
    assert re.search(r"data: source '.*corpus.*; continuing with its tokens in ", caplog.text)
    assert resume(home / "run") == 0
    assert losses(home / "run") == losses(home / "whole")
    assert inputs(home / "run") == inputs(home / "whole")
    assert main(["evaluate", "--checkpoint", str(home / "run")]) == 0


def test_a_source_that_is_named_has_to_be_there(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A misspelt path is not taken for one that is gone."""
    start(whole=False)
    assert resume(Path("run"), "--data.source", "corpsu") == 2
    assert "source 'corpsu' is not a file or directory and matches none; restore it" in capsys.readouterr().err


def test_an_empty_directory_is_a_source_that_is_gone(home: Path) -> None:
    """Such as the mount point of a disk that is not there."""
    start(whole=False)
    shutil.rmtree("corpus")
    Path("corpus").mkdir()
    assert resume(Path("run")) == 0


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_neither_source_nor_tokens_is_an_error_that_names_both(
    home: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    start(whole=False)
    shutil.rmtree("corpus")
    (fingerprint,) = (path.name for path in Path("cache").iterdir() if path.is_dir())
    Path("cache").rename("moved")
    options = ["--resume", "run", "--max-steps", "4"] if command == "train" else ["--checkpoint", "run"]
    assert main([command, *options]) == 2
    message = capsys.readouterr().err
    assert f"source 'corpus' is not a file or directory and matches none, nor are its tokens in {home}/cache" in message
    assert ("name with --data.source where it or its tokens are" in message) == (command == "train")
    assert main([command, *options, "--cache", "moved"]) == 0
    if command == "train":
        assert resume(Path("run"), "--cache", "none", "--data.source", f"moved/{fingerprint}", steps=5) == 0


def test_damaged_tokens_without_a_source_are_not_simply_deleted(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start(whole=False)
    Path("corpus").rename("kept")
    (shard,) = Path("cache").glob("*/train-00000.npy")
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert resume(Path("run")) == 1
    message = capsys.readouterr().err
    assert "the checksum of train-00000.npy differs from the manifest's; restore its source (source 'corpus'" in message
    shutil.rmtree(shard.parent)
    assert resume(Path("run"), "--data.source", "kept") == 0


def test_a_project_may_move_as_a_whole(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start()
    moved = home.parent / "other" / "project"
    home.rename(moved)
    monkeypatch.chdir(moved)
    assert resume(Path("run")) == 0
    assert losses(Path("run")) == losses(Path("whole"))


def test_the_tokenizer_comes_from_the_checkpoint(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("tokenizer").mkdir()
    learn_bpe(["def total(values): return total"] * 9, 270).save(Path("tokenizer"))
    start(tokenizer="tokenizer/tokenizer.json")
    shutil.rmtree("tokenizer")
    shutil.rmtree("cache")
    monkeypatch.chdir(home.parent / "other")
    assert resume(home / "run") == 0
    assert losses(home / "run") == losses(home / "whole")
    assert main(["evaluate", "--checkpoint", str(home / "run")]) == 0


def test_a_learnt_tokenizer_is_not_learnt_again(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another version of the library may learn another one, from the same text, under the same name."""

    def learn_another(texts: Iterable[str], vocab_size: int) -> HuggingFaceTokenizer:
        return learn_bpe(["xyzzy"], vocab_size)

    start(tokenizer="bpe:300")
    shutil.rmtree("cache")
    monkeypatch.setattr(prepare, "learn_bpe", learn_another)
    prepare_data(DataConfig(source=("corpus",), tokenizer="bpe:300", validation_fraction=0.25), Path("cache"))
    assert resume(Path("run")) == 2
    assert "holds the tokens of another tokenizer" in capsys.readouterr().err
    shutil.rmtree("cache")
    assert resume(Path("run")) == 0
    assert losses(Path("run")) == losses(Path("whole"))


def test_a_tokenised_corpus_is_a_source(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """For a new run, or one whose source has changed; only with the options that it was tokenised with."""
    start()
    Path("corpus/module_0.py").write_text("changed")
    (tokens,) = (path for path in Path("cache").iterdir() if path.is_dir())
    assert resume(Path("run"), "--data.source", str(tokens), steps=3) == 0
    assert resume(Path("run")) == 0
    assert losses(Path("run")) == losses(Path("whole"))
    assert inputs(Path("run"))["names"] == ["corpus"]

    command = ["train", "--config", "whole/config.toml", "--data.source", str(tokens), "--cache", "none"]
    assert main([*command, "--out", "again"]) == 0
    assert losses(Path("again")) == losses(Path("whole"))
    assert not Path("none").exists()
    capsys.readouterr()
    for option, value in (("tokenizer", "bpe:300"), ("seed", "1"), ("validation-fraction", "0.5")):
        assert main([*command, "--out", "wrong", f"--data.{option}", value]) == 2
        message = capsys.readouterr().err
        assert "tokenised with tokenizer 'bytes', seed 0 and validation_fraction 0.25; expected the same" in message
        assert value in message
    (tokens / "train-00000.npy").unlink()
    assert main([*command, "--out", "wrong"]) == 1
    assert capsys.readouterr().err.endswith("is damaged: train-00000.npy is missing\n")
