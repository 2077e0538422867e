"""``mtp bench decode``: every batch size and number of drafts once, ratios of medians, table, JSON and plot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mtp_ext.cli.bench_decode import DecodeBench
from mtp_ext.cli.main import main
from tests.train.tiny import run, tiny_config

SMALL = ("bench", "decode", "--d-model", "16", "--n-layers", "4", "--n-attn-heads", "2", "--vocab-size", "40")
SHORT = ("--prompt-tokens", "6", "--new-tokens", "10", "--repetitions", "2", "--device", "cpu")


def results(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main([*arguments, "--json"]) == 0
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    return document


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_random_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str], dtype: str) -> None:
    out = tmp_path / "new" / "results"
    options = ("--batch-sizes", "1", "3", "--n-future", "3", "--dtype", dtype, "--out", str(out))
    document = results(capsys, *SMALL, *SHORT, *options, "--acceptance", "0", "0.5", "1")
    assert json.loads((out / "decode.json").read_text()) == document
    assert (out / "decode.png").read_bytes().startswith(b"\x89PNG")
    rows = document["results"]
    assert [(r["batch"], r["n_draft"]) for r in rows] == [(b, k) for b in (1, 3) for k in (0, 1, 2)]
    assert [r["n_prompts"] for r in rows] == [2, 2, 2, 6, 6, 6]
    assert document["dtype"] == dtype and document["model"]["n_future"] == 3 and document["threads"] >= 1
    for plain, *drafted in (rows[:3], rows[3:]):
        assert plain["time_ratio"] == plain["speed_per_token"] == 1.0
        for r in (plain, *drafted):
            seconds = r["seconds_per_round"]
            assert r["time_ratio"] * plain["seconds_per_round"] == pytest.approx(seconds)
            assert r["speed_per_token"] * r["time_ratio"] == pytest.approx(1.0)
            lengths = {"0": 1.0, "0.5": 2 - 0.5 ** r["n_draft"], "1": 1.0 + r["n_draft"]}
            assert r["tokens_per_second_at"] == pytest.approx({a: r["batch"] * n / seconds for a, n in lengths.items()})


def test_the_table_has_a_row_for_each(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main([*SMALL, *SHORT, "--batch-sizes", "2", "--n-future", "2"]) == 0
    out = capsys.readouterr().out
    lines = [line.split("│")[1:-1] for line in out.splitlines() if line.startswith("│")]
    assert [[cell.strip() for cell in line[:2]] for line in lines] == [["2", "0"], ["2", "1"]]
    assert "V = 40" in out and "a = 0.6" in out and "…" not in out


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("bench")
    run(tiny_config(root, max_steps=20))
    return root / "run"


def test_a_checkpoint_decodes_its_held_out_text(
    trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("bench", "decode", "--checkpoint", str(trained), *SHORT)
    document = results(capsys, *options)
    assert document["checkpoint"] == str(trained) and document["model"]["d_model"] == 16
    assert all(1.0 <= r["tokens_per_forward"]["value"] <= 1 + r["n_draft"] for r in document["results"])
    monkeypatch.setenv("COLUMNS", "80")
    assert main(list(options)) == 0
    out = capsys.readouterr().out
    assert "tok/fwd" in out and "…" not in out


def test_few_prompts_are_repeated(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("bench", "decode", "--checkpoint", str(trained), "--batch-sizes", "300", "--repetitions", "1")
    (plain, _) = results(capsys, *options, "--prompt-tokens", "12", "--new-tokens", "2", "--device", "cpu")["results"]
    assert plain["n_prompts"] == 300


def test_heads_that_read_drafts_draft_too(capsys: pytest.CaptureFixture[str]) -> None:
    document = results(capsys, *SMALL, *SHORT, "--variant", "sequential_modules", "--batch-sizes", "1")
    assert [r["n_draft"] for r in document["results"]] == [0, 1, 2, 3]


def test_a_model_of_bfloat16_is_of_bfloat16() -> None:
    model, prompts = DecodeBench(d_model=16, n_layers=4, n_attn_heads=2, dtype="bfloat16")._model_and_prompts(
        torch.device("cpu")
    )
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} and len(prompts) == 24


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_sizes": (1, 0)}, "batch_sizes must be at least 1, got 0"),
        ({"batch_sizes": ()}, "batch_sizes must name at least one"),
        ({"new_tokens": 1}, "new_tokens must be at least 2, got 1"),
        ({"prompt_tokens": 0}, "prompt_tokens must be at least 1, got 0"),
        ({"repetitions": 0}, "repetitions must be at least 1, got 0"),
        ({"acceptance": (0.5, 1.5)}, r"acceptance must be in \[0, 1\], got 1.5"),
        ({"acceptance": (float("nan"),)}, r"acceptance must be in \[0, 1\], got nan"),
    ],
)
def test_wrong_options_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DecodeBench(**changes)


def test_wrong_shapes_and_long_prompts_are_one_sentence(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options, message in (
        (("--variant", "other"), "variant"),
        (("--d-model", "0"), "d_model"),
        (("--checkpoint", str(trained), "--prompt-tokens", "90"), "max_seq_len=96"),
    ):
        assert main([*SMALL, *options]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


def test_trees_are_timed_beside_chains(capsys: pytest.CaptureFixture[str]) -> None:
    options = (*SMALL, *SHORT, "--batch-sizes", "1", "--n-future", "3", "--trees", "2,1", "3")
    rows = results(capsys, *options)["results"]
    assert [(r["n_draft"], r["tree"]) for r in rows] == [(0, []), (1, []), (2, []), (2, [2, 1]), (1, [3])]
    assert rows[-1]["time_ratio"] > 0 and rows[-1]["tokens_per_second_at"] == {}
    assert main([*options]) == 0
    assert "2,1" in capsys.readouterr().out


def test_a_tree_that_is_none_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, *SHORT, "--trees", "2;1"]) != 0
    assert "trees must be numbers with commas between them, such as 3,2,1, got '2;1'" in capsys.readouterr().err
