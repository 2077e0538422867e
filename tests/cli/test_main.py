"""The command as a whole: usage, errors in one sentence, exit codes."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import mtp_ext
from mtp_ext.cli.main import COMMANDS, main
from mtp_ext.train.config import TrainConfig
from mtp_ext.train.config_file import read_config, read_toml, write_config
from tests.train.tiny import run, tiny_config


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a command."""
    try:
        code = main(arguments)
    except SystemExit as stop:
        code = int(stop.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "--help")
    assert code == 0
    assert all(f"  {name}" in out for name in COMMANDS)


def test_no_command_is_a_wrong_call(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys)
    assert code == 2 and "usage: mtp" in out


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(capsys: pytest.CaptureFixture[str], name: str) -> None:
    code, out, _ = call(capsys, name, "--help")
    assert code == 0 and f"usage: mtp {name}" in out


def test_help_explains_every_option_of_training(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = call(capsys, "train", "--help")
    for part in (
        "--max-steps",
        "--data.source",
        "--optim.muon-lr",
        "Peak learning rate of Muon",
        "--resume",
        "--config",
    ):
        assert part in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nonsense",), "mtp: unknown command 'nonsense'; expected one of train, generate"),
        (("train", "--config", "absent.toml"), "mtp train: config: cannot read absent.toml: No such file or directory"),
        (("train", "--resume", "absent"), "mtp train: checkpoint: expected the directory of a checkpoint or of a run"),
        (("train", "--device", "tpu"), "mtp train: device must be cpu, cuda, cuda:<number> or auto, got 'tpu'"),
        (("train", "--data.source", "absent"), "mtp train: source 'absent' is not a file or directory"),
        (("generate", "--checkpoint", "absent", "--prompt", "x"), "but absent does not exist"),
        (("evaluate", "--checkpoint", "absent"), "but absent does not exist"),
        (("info", "--config", "absent.toml"), "mtp info: config: cannot read absent.toml"),
    ],
)
def test_user_errors_are_one_sentence(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = call(capsys, *arguments)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1 and "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "--nonsense", "1"), "Unrecognized options: --nonsense"),
        (("train", "--optim.lr", "fast"), "--optim.lr"),
        (("train", "--batch.seq-len", "0"), "batch.seq_len must be at least 1, got 0"),
        (("train", "--max-seconds", "0"), "max_seconds must be greater than 0, got 0.0"),
        (("train", "--model.d-model", "0"), "model.d_model must be at least 1, got 0"),
        (("train", "--optim.name", "sgd"), "sgd"),
        (("generate",), "--checkpoint"),
    ],
)
def test_wrong_options_are_named(capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str) -> None:
    code, _, err = call(capsys, *arguments)
    assert code == 2 and message in err and "Traceback" not in err


def test_a_failed_run_is_code_one(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config = tiny_config(tmp_path, max_steps=20)
    write_config(dataclasses.replace(config, optim=dataclasses.replace(config.optim, lr=1e38, clip_norm=0)), tmp_path)
    code, _, err = call(capsys, "train", "--config", str(tmp_path / "config.toml"), "--schedule.warmup-steps", "0")
    assert code == 1
    assert re.fullmatch(r"mtp train: step \d+: the loss is not finite.*\n", err)


def test_debug_shows_where(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot read"):
        main(["train", "--config", str(tmp_path / "absent.toml"), "--debug"])


def test_a_ctrl_c_outside_the_loop_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import mtp_ext.cli.info as info

    def interrupted(_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(info, "run", interrupted)
    assert call(capsys, "info") == (130, "", "mtp: interrupted\n")


@pytest.mark.slow
def test_python_dash_m_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "mtp_ext", "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "usage: mtp <command>" in done.stdout


def test_info_names_build_and_machine(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "info")
    assert code == 0
    for key, value in mtp_ext.build_info().items():
        assert key in out and str(value) in out
    assert "torch" in out and "Missing" in out


def test_info_counts_the_architectures_of_a_configuration(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    write_config(config, tmp_path)
    code, out, err = call(capsys, "info", "--config", str(tmp_path / "config.toml"))
    assert code == 0, err
    shape = config.model.build(257, 24)
    assert "parallel *" in out and "S = 24" in out
    for variant in ("parallel", "linear", "replicated", "causal", "anticausal"):
        (line,) = [line for line in out.splitlines() if line.split() and line.split()[0] == variant]
        total = dataclasses.replace(shape, variant=variant).parameter_counts()["total"]
        assert f"{total / 1e6:.2f}" in line.split()
    run(config)
    assert call(capsys, "info", "--config", str(config.out))[1] == out


def test_training_ends_with_all_that_was_promised(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config = tiny_config(tmp_path, max_steps=3)
    logging = dataclasses.replace(config.logging, plots=True, tensorboard=True, sample_tokens=8)
    write_config(dataclasses.replace(config, logging=logging), tmp_path)
    code, out, _ = call(capsys, "train", "--config", str(tmp_path / "config.toml"))
    assert code == 0
    losses, speeds = ("nats/token", "nats/byte", "top-1"), ("accept length", "tokens per forward", "tokens per second")
    for part in (*losses, *speeds, "peak memory", "held out"):
        assert part in out, part
    paths = re.findall(r"^(?:checkpoint|plot|records|summary)\s+(\S+)$", out, flags=re.MULTILINE)
    assert len(paths) == 5 and all(Path(path).exists() for path in paths)


def test_a_prepared_run_can_be_continued_by_its_path(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run(tiny_config(tmp_path, max_steps=1))
    code, out, _ = call(capsys, "train", "--resume", str(tmp_path / "run"), "--max-steps", "2")
    assert code == 0
    assert "continuing" in out and "max_steps: 1 -> 2" in out


@pytest.mark.slow
def test_names_that_are_not_utf8_are_trained_on_and_recorded(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """In the source, the directory of the run and the cache; on an ASCII terminal they are escaped."""
    root = tmp_path / os.fsdecode(b"caf\xe9")
    config = tiny_config(root, max_steps=1)
    for number in range(12):
        path = root / "corpus" / f"module_{number}.py"
        path.rename(path.with_name(os.fsdecode(b"\xe9") + path.name))
    logging = dataclasses.replace(config.logging, plots=True, tensorboard=True, sample_tokens=8)
    write_config(dataclasses.replace(config, logging=logging), tmp_path)
    assert read_config(tmp_path) == read_toml(tmp_path / "config.toml", TrainConfig())
    code, out, err = call(capsys, "train", "--config", str(tmp_path / "config.toml"))
    assert code == 2 and "out: TensorBoard writes to paths in UTF-8 only, got" in err
    config_file = str(tmp_path / "config.toml")
    code, out, err = call(capsys, "train", "--config", config_file, "--logging.no-tensorboard")
    assert (code, err) == (0, "")
    assert "held out" in out and "caf\\udce9" in out
    assert call(capsys, "train", "--resume", str(root / "run"), "--max-steps", "2")[::2] == (0, "")
    assert call(capsys, "generate", "--checkpoint", str(root / "run"), "--prompt", "é")[0] == 0


@pytest.mark.slow
def test_an_ascii_terminal_shows_other_characters_escaped(tmp_path: Path) -> None:
    run(tiny_config(tmp_path, max_steps=1))
    arguments = ["generate", "--checkpoint", str(tmp_path / "run"), "--prompt", "é", "--temperature", "2"]
    arguments += ["--max-new-tokens", "50"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "mtp_ext", *arguments]
    done = subprocess.run(command, capture_output=True, timeout=120, env=environment)
    assert done.returncode == 0 and done.stderr.startswith(b"mtp generate: ") and done.stderr.count(b"\n") == 1
    assert done.stdout.isascii() and (b"\\x" in done.stdout or b"\\u" in done.stdout)
