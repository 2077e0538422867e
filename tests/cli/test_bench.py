"""``mtp bench loss``: a table for people, JSON for programs, wrong sizes refused."""

from __future__ import annotations

import json

import pytest

from mtp_ext.cli.bench_loss import LossBench
from mtp_ext.cli.main import main

SMALL = (
    "bench",
    "loss",
    "--positions",
    "8",
    "--d-model",
    "4",
    "--vocab-size",
    "30",
    "--n-future",
    "2",
    "--device",
    "cpu",
)


def test_table_names_both_implementations(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--rounds", "1"]) == 0
    out = capsys.readouterr().out
    assert "mtp_ext" in out and "plain torch" in out and "V = 30" in out


def test_json_without_plain_torch(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--rounds", "2", "--json", "--skip-plain", "--dtype", "bfloat16"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [r["implementation"] for r in document["results"]] == ["mtp_ext"]
    assert document["results"][0]["milliseconds"] > 0 and document["shape"]["dtype"] == "bfloat16"


def test_a_size_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="positions must be at least 1, got 0"):
        LossBench(positions=0)


@pytest.mark.parametrize("arguments", [[], ["heads"], ["--positions", "8"], ["loss", "--positions", "0"]])
def test_wrong_arguments_are_a_usage_error(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ending:
        main(["bench", *arguments])
    assert ending.value.code == 2 and capsys.readouterr().err
