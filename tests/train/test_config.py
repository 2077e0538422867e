"""Configurations: TOML, command line, precedence, and errors that name the key."""

from __future__ import annotations

import dataclasses
import types
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import pytest

from mtp_ext.train.config import BatchConfig, LossConfig, ModelConfig, OptimConfig, TrainConfig
from mtp_ext.train.config_file import override, read_config, read_toml, to_dict, write_config


def toml(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_file_sets_what_it_names_and_nothing_else(tmp_path: Path) -> None:
    path = toml(
        tmp_path, 'seed = 3\n[model]\nn_future = 2\n[data]\nsource = ["a", "b"]\n[loss]\nhead_weights = [1, 0.5]\n'
    )
    base = TrainConfig()
    assert read_toml(path, base) == dataclasses.replace(
        base,
        seed=3,
        model=dataclasses.replace(base.model, n_future=2),
        data=dataclasses.replace(base.data, source=("a", "b")),
        loss=LossConfig(head_weights=(1.0, 0.5)),
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sead = 1", "unknown key 'sead'; did you mean 'seed'?"),
        ("[model]\nd_modle = 1", "unknown key 'model.d_modle'; did you mean 'model.d_model'?"),
        ("[nonsense]\nx = 1", "unknown key 'nonsense'; known are out, max_steps"),
        ("seed = 'one'", "seed must be an integer, got 'one'"),
        ("seed = true", "seed must be an integer, got True"),
        ("max_steps = 1.5", "max_steps must be an integer, got 1.5"),
        ("[optim]\nlr = '1e-3'", "optim.lr must be a number, got '1e-3'"),
        ("[optim]\nname = 'sgd'", "optim.name must be one of adamw, muon, got 'sgd'"),
        ("[logging]\nplots = 1", "logging.plots must be true or false, got 1"),
        ("[data]\nsource = [1]", "data.source must be a string, got 1"),
        ("[data]\nsource = 3", "data.source must be a list, got 3"),
        ("[loss]\nhead_weights = 1.0", "loss.head_weights must be a list, got 1.0"),
        ("model = 3", "model must be a section, got 3"),
        ("[batch]\nseq_len = 0", "batch.seq_len must be at least 1, got 0"),
        ("[loss]\nhead_weights = [1.0]", "one weight per head"),
        ("= 3", "is not valid TOML"),
    ],
)
def test_errors_name_the_file_and_the_key(tmp_path: Path, text: str, message: str) -> None:
    path = toml(tmp_path, text)
    with pytest.raises(ValueError) as error:
        read_toml(path, TrainConfig())
    assert message in str(error.value)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("name", ["source", "suffixes", "exclude"])
def test_a_single_string_is_a_list_of_one(tmp_path: Path, name: str) -> None:
    config = read_toml(toml(tmp_path, f"[data]\n{name} = 'src'\n[loss]\nweight_points = '0:1,1,1,1'"), TrainConfig())
    assert getattr(config.data, name) == ("src",) and config.loss.weight_points == ("0:1,1,1,1",)


def test_an_absent_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config: cannot read .*nothing.toml: No such file"):
        read_toml(tmp_path / "nothing.toml", TrainConfig())


@pytest.mark.parametrize(
    "config",
    [
        TrainConfig(),
        TrainConfig(
            out=Path("a/b"),
            max_seconds=2.5,
            max_tokens=10,
            model=ModelConfig(preset="1M", tie_embeddings=True),
            batch=BatchConfig(seq_len=7),
            loss=LossConfig(head_weights=(1.0, 0.5, 0.25, 0.125)),
            optim=OptimConfig(lr=1e-4, beta2=0.999),
        ),
    ],
)
def test_what_is_written_reads_back_equal(tmp_path: Path, config: TrainConfig) -> None:
    write_config(config, tmp_path)
    assert read_config(tmp_path) == config
    assert read_toml(tmp_path / "config.toml", TrainConfig()) == config
    assert override(TrainConfig(), to_dict(config), "dict") == config


def test_none_is_always_the_default() -> None:
    """TOML has no null, so a field that was ``None`` is left out of the file: it must come back as ``None``."""

    def check(section: Any) -> None:
        for name, hint in get_type_hints(type(section)).items():
            value = getattr(section, name)
            if dataclasses.is_dataclass(hint):
                check(value)
            elif get_origin(hint) in (Union, types.UnionType) and type(None) in get_args(hint):
                assert value is None, name

    check(TrainConfig())


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: TrainConfig(max_steps=0), "max_steps must be at least 1, got 0"),
        (lambda: TrainConfig(max_tokens=0), "max_tokens must be at least 1, got 0"),
        (lambda: TrainConfig(max_seconds=0.0), r"max_seconds must be greater than 0, got 0\.0"),
        (lambda: TrainConfig(max_seconds=-1.0), r"max_seconds must be greater than 0, got -1\.0"),
        (lambda: TrainConfig(max_seconds=float("nan")), "max_seconds must be greater than 0, got nan"),
        (lambda: TrainConfig(threads=0), "threads must be at least 1, got 0"),
        (lambda: ModelConfig(d_model=0), "model.d_model must be at least 1, got 0"),
        (lambda: ModelConfig(n_future=0), "model.n_future must be at least 1, got 0"),
        (lambda: ModelConfig(max_seq_len=0), "model.max_seq_len must be at least 1, got 0"),
        (lambda: OptimConfig(beta2=1.5), r"optim.beta2 must be in \[0, 1\], got 1.5"),
        (lambda: OptimConfig(lr=-1.0), "optim.lr must be at least 0, got -1.0"),
    ],
)
def test_values_out_of_range_are_refused(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_the_default_model_has_two_trunk_layers_and_four_heads() -> None:
    config = ModelConfig().build(vocab_size=100, seq_len=64)
    assert (config.n_future, config.variant, config.vocab_size) == (4, "parallel", 100)
    assert config.max_seq_len == 256


def test_sizes_override_the_preset() -> None:
    config = ModelConfig(preset="1M", d_model=64, n_future=2).build(vocab_size=100, seq_len=8)
    assert (config.d_model, config.n_layers, config.n_attn_heads, config.n_future) == (64, 5, 4, 2)
