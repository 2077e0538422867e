"""Decoding of held-out text: prompts within documents, the command's numbers, table and plot."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from mtp_ext.cli.main import main
from mtp_ext.generate.measure import measure_decoding
from mtp_ext.nn.variants import VARIANTS
from mtp_ext.train.checkpoint.directory import list_checkpoints
from mtp_ext.train.checkpoint.saved_model import load_saved_model
from mtp_ext.train.config import BatchConfig, LoggingConfig, ModelConfig, TrainConfig
from mtp_ext.train.data import TokenSplit
from mtp_ext.train.evaluation.decoding import DecodeConfig, choose_prompts, compare_with_drafts, measure_on_split
from mtp_ext.train.run import train
from tests.train.tiny import run, tiny_config, tiny_dataset, tiny_model, write_corpus


def split_of(*lengths: int) -> TokenSplit:
    """Documents whose tokens count 1, 2, ... from the first document on, each ended by 0."""
    documents, token = [], 1
    for length in lengths:
        documents += [np.arange(token, token + length), np.zeros(1, dtype=np.int64)]
        token += length
    starts = np.concatenate([[0], np.cumsum(np.array(lengths) + 1)])
    return TokenSplit("validation", (np.concatenate(documents).astype(np.uint16),), starts, 1)


def test_prompts_are_disjoint_windows_of_documents() -> None:
    found = choose_prompts(split_of(20, 0, 3, 10, 9), 99, 6, 4)
    starts = [(1, 6), (11, 6), (21, 2), (24, 6), (34, 5)]  # two of 20, half of 3, one of 10, half of 9 (none of 0)
    assert [prompt.tolist() for prompt in found] == [list(range(first, first + n)) for first, n in starts]
    assert all(prompt.dtype == torch.int64 for prompt in found)


@pytest.mark.parametrize("count", [1, 2, 3, 7, 24, 25, 100])
def test_fewer_prompts_are_spread_evenly(count: int) -> None:
    found = [int(prompt[0]) for prompt in choose_prompts(split_of(100, 20, 120), count, 6, 4)]
    assert len(found) == min(count, 24) and len(set(found)) == len(found)
    gaps = np.diff([*found, 241])
    assert gaps.max() - gaps.min() <= 10 and gaps.min() >= 10


def test_short_prompts_and_empty_documents() -> None:
    assert [p.tolist() for p in choose_prompts(split_of(1, 2, 9), 9, 3, 97)] == [[1], [2], [4, 5, 6]]
    with pytest.raises(ValueError, match="no text to continue"):
        choose_prompts(split_of(0, 0), 4, 6, 4)


@pytest.mark.parametrize("longest", [1, 2, 3, 96, 190, 4096])
def test_default_lengths_fit_the_model(longest: int) -> None:
    config = DecodeConfig().fitted(longest)
    assert config.prompt_tokens is not None and config.new_tokens is not None
    assert 1 <= config.prompt_tokens <= 128 and 1 <= config.new_tokens <= 64
    assert config.prompt_tokens + config.new_tokens <= max(2, longest)
    assert DecodeConfig(prompt_tokens=7, new_tokens=9).fitted(longest) == DecodeConfig(prompt_tokens=7, new_tokens=9)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("decoding")
    run(tiny_config(root, max_steps=30))
    return root / "run"


def evaluated(capsys: pytest.CaptureFixture[str], trained: Path, *options: str) -> str:
    capsys.readouterr()
    assert main(["evaluate", "--checkpoint", str(trained), *options]) == 0
    return capsys.readouterr().out


def test_the_command_writes_what_decoding_gives(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [
        "--decode.prompts",
        "6",
        "--decode.prompt-tokens",
        "20",
        "--decode.new-tokens",
        "12",
        "--decode.batch-size",
        "4",
    ]
    out = tmp_path / "new" / "directory"
    printed = json.loads(evaluated(capsys, trained, *options, "--json", "--out", str(out)))
    assert json.loads((out / "evaluation.json").read_text()) == printed
    assert (out / "acceptance.png").read_bytes().startswith(b"\x89PNG")
    saved, config = load_saved_model(trained, torch.device("cpu")), tiny_config(trained.parent)
    prompts = choose_prompts(tiny_dataset(config).split("validation"), 6, 20, 12)
    (expected,) = measure_decoding(saved.model, prompts, 12, [1], batch_size=4, eos_token=256)
    decoding = printed["decoding"]
    assert decoding["n_prompts"] == 6 and decoding["prompt_tokens"] == 20 and decoding["n_draft"] == 1
    assert decoding["tokens_per_forward"] == expected.tokens_per_forward._asdict()
    (accepted,) = decoding["acceptance_per_position"]
    assert accepted == expected.acceptance_per_position[0]._asdict() and 0 < accepted["value"] <= 1
    assert "bootstrap over prompts" in decoding["interval"]


def test_the_table_has_every_draft(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = evaluated(capsys, trained, "--decode.prompts", "3")
    number = json.loads(evaluated(capsys, trained, "--decode.prompts", "3", "--json"))["decoding"]
    rate, length = number["acceptance_per_position"][0], number["tokens_per_forward"]
    assert "Decoding, greedy" in shown and f"{rate['value']:.1%} ({rate['low']:.1%} to {rate['high']:.1%})" in shown
    assert f"{length['value']:.2f} ({length['low']:.2f} to {length['high']:.2f}) of 2" in shown


@pytest.mark.slow
def test_sampling_is_reproducible_by_seed(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def sampled(*options: str) -> object:
        common = ("--decode.prompts", "4", "--decode.new-tokens", "80", "--decode.temperature", "1", "--json")
        number = json.loads(evaluated(capsys, trained, *common, *options))["decoding"]
        return [number[key] for key in ("tokens_per_forward", "acceptance_per_position", "n_rounds")]

    assert sampled() == sampled() != sampled("--decode.seed", "7")


def test_no_drafts_and_no_prompts(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--decode.n-draft", "0", "--decode.prompts", "1", "--out", str(tmp_path), "--json")
    number = json.loads(evaluated(capsys, trained, *options))["decoding"]
    assert number["tokens_per_forward"] == {"value": 1.0, "low": None, "high": None}
    assert number["acceptance_per_position"] == [] and not (tmp_path / "acceptance.png").exists()
    assert "decoding" not in json.loads(evaluated(capsys, trained, "--decode.prompts", "0", "--json"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--decode.n-draft", "2"), "n_draft must be at most 1"),
        (("--decode.prompt-tokens", "96"), "max_seq_len=96"),
        (("--decode.top-p", "0", "--decode.temperature", "1"), "top_p must be in (0, 1]"),
    ],
)
def test_errors_are_one_sentence(
    trained: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], message: str
) -> None:
    assert main(["evaluate", "--checkpoint", str(trained), *options]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "value"), [("prompts", -1), ("prompt_tokens", 0), ("new_tokens", 0), ("batch_size", 0)]
)
def test_wrong_sizes_are_refused(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=rf"decode.{name} must be at least {value + 1}, got {value}"):
        DecodeConfig(**{name: value})


def test_another_source_is_decoded(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = write_corpus(tmp_path / "other", files=2, seed=9)
    printed = json.loads(evaluated(capsys, trained, "--source", str(other), "--decode.prompts", "500", "--json"))
    assert 2 <= printed["decoding"]["n_prompts"] < 500


def test_several_numbers_of_drafts_decode_alike(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    dataset = tiny_dataset(config)
    model = tiny_model(config, dataset)
    plain, drafted = measure_on_split(model, dataset, "validation", DecodeConfig(prompts=3), [0, 1])
    assert (plain.n_draft, drafted.n_draft) == (0, 1) and drafted.same_texts(plain) == 3


def with_sample(config: TrainConfig) -> TrainConfig:
    return dataclasses.replace(config, logging=dataclasses.replace(config.logging, sample_tokens=4))


def test_a_run_ends_with_the_comparison(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = with_sample(tiny_config(tmp_path, max_steps=3))
    outcome = train(config, None, Console())
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    plain, drafted = summary["decoding"]
    assert (plain["n_draft"], drafted["n_draft"], drafted["same_texts"]) == (0, 1, 6)
    assert drafted["n_tokens"] == plain["n_tokens"] and plain["tokens_per_forward"]["value"] == 1
    length, faster = drafted["tokens_per_forward"]["value"], drafted["tokens_per_second"] / plain["tokens_per_second"]
    shown = capsys.readouterr().out
    assert f"{length:.2f} tokens per forward, {faster:.2f} times as fast as without" in shown
    assert "the same with and without drafts for 6 of 6 held-out prompts" in shown
    assert outcome.evaluation is not None and summary["validation"] == outcome.evaluation.as_dict()
    assert summary["step"] == 3 and summary["tokens_per_second"] == outcome.ending.tokens_per_second


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"logging": LoggingConfig(tensorboard=False, plots=False, sample_tokens=0)},
        {"model": ModelConfig(n_future=1, d_model=16, n_layers=2, n_attn_heads=2)},
        {"batch": BatchConfig(seq_len=2)},
        {"batch": BatchConfig(seq_len=1), "model": ModelConfig(n_future=2, d_model=16, n_attn_heads=2, max_seq_len=1)},
    ],
    ids=["no sample", "one head", "no room", "one position"],
)
def test_a_run_without_drafts_has_no_comparison(tmp_path: Path, changes: dict[str, Any]) -> None:
    config = with_sample(tiny_config(tmp_path, max_steps=1))
    run(dataclasses.replace(config, **changes))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["decoding"] == [] and summary["validation"]["evaluated_tokens"] > 0


def test_nothing_held_out_is_no_error(tmp_path: Path) -> None:
    config = with_sample(tiny_config(tmp_path, max_steps=1))
    run(dataclasses.replace(config, data=dataclasses.replace(config.data, validation_fraction=0.0)))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["decoding"] == [] and summary["validation"] is None


def test_a_summary_is_not_left_from_an_earlier_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(tmp_path, max_steps=1)
    outcome = run(config)
    monkeypatch.setattr("mtp_ext.train.loop.Loop.run", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(dataclasses.replace(config, max_steps=2), list_checkpoints(outcome.checkpoint.parent)[-1])
    assert not (tmp_path / "run" / "summary.json").exists()


def test_the_comparison_stops_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(tmp_path)
    dataset = tiny_dataset(config)
    monkeypatch.setattr("mtp_ext.train.evaluation.decoding.COMPARISON_SECONDS", 0.0)
    plain, drafted = compare_with_drafts(tiny_model(config, dataset), dataset, 24)
    assert len(plain.rows) == len(drafted.rows) == 1


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_architecture_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str], variant: str) -> None:
    model = ModelConfig(variant=variant, n_future=3, d_model=16, n_layers=5, n_attn_heads=2)
    run(with_sample(tiny_config(tmp_path, max_steps=1, model=model)))
    compared = json.loads((tmp_path / "run" / "summary.json").read_text())["decoding"]
    number = json.loads(evaluated(capsys, tmp_path / "run", "--decode.prompts", "3", "--json"))["decoding"]
    assert len(compared) == 2 and number["n_draft"] == 2
