"""``mtp plan``: a table for people, JSON for programs, whether it fits, wrong calls refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mtp_ext.cli.main import main

SMALL = ("plan", "--preset", "1M", "--vocab-size", "300", "--seq-len", "32", "--device", "cpu", "--dtype", "float32")


def test_the_table_has_every_category_and_what_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(SMALL) == 0
    out = capsys.readouterr().out
    for part in ("parameters", "gradients", "optimizer", "activations", "logits", "workspace", "peak", "not in it: "):
        assert part in out


@pytest.mark.slow
def test_json_has_the_bytes_and_the_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--json", "--gib", "1"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["bytes"]["peak"] > document["bytes"]["parameters"] > 1e6
    assert document["fits"] is True and document["model"]["vocab_size"] == 300


@pytest.mark.slow
def test_what_does_not_fit_comes_with_planned_changes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--schedule", "joint", "--batch-size", "4", "--gib", "0.001"]) == 1
    out = capsys.readouterr().out
    assert "does not fit in 0.001 GiB" in out and "with --schedule sequential: " in out and "--batch-size 2: " in out


@pytest.mark.slow
def test_a_file_of_options_is_planned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.toml"
    path.write_text('[model]\nd_model = 64\nn_attn_heads = 1\n[batch]\nseq_len = 48\n[data]\ntokenizer = "bytes"\n')
    assert main(["plan", "--config", str(path), "--device", "cpu", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model"]["d_model"] == 64


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("plan",), "give either --preset or --config"),
        ((*SMALL, "--config", "run.toml"), "give either --preset or --config"),
        ((*SMALL, "--gib", "0"), "gib must be greater than 0"),
        ((*SMALL, "--world-size", "8"), "world_size must be 1"),
        ((*SMALL, "--batch-size", "0"), "batch_size must be at least 1"),
        ((*SMALL, "--variant", "cubic"), "variant"),
    ],
)
def test_a_wrong_call_is_refused(capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str) -> None:
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
