"""The decoding demo: trains, decodes unseen packages, and shows its figures beside the paper's."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.pages.decode_sections import demo_section, rounds_section
from benchmarks.studies import decode_demo, decode_rounds
from mtp_ext.train.config import ModelConfig
from mtp_ext.train.evaluation.decoding import DecodeConfig
from tests.train.tiny import write_corpus


def test_the_sizes_are_those_that_the_text_promises() -> None:
    models = {name: model.build(257, seq_len) for name, (model, _, seq_len) in decode_demo.MODELS.items()}
    assert (models["bytes"].n_future, models["bytes"].variant) == (8, "replicated")
    assert (models["tokens"].n_future, models["tokens"].variant) == (4, "parallel")
    assert models["tokens"].n_trunk_layers >= 8
    for name, (_, _, seq_len) in decode_demo.MODELS.items():
        assert models[name].max_seq_len >= seq_len // 2 + seq_len // 4


@pytest.mark.slow
def test_a_model_is_trained_once_and_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Both commands of a user in this process; the run is a process of its own."""
    write_corpus(tmp_path / "corpus", files=20)
    tiny = ModelConfig(n_future=3, variant="replicated", d_model=16, n_layers=2)
    monkeypatch.setattr(decode_demo, "MODELS", {"bytes": (tiny, "bytes", 32)})
    monkeypatch.setattr(decode_demo, "TEXTS", ("tyro", "rich"))
    config = DecodeConfig(prompts=4, prompt_tokens=16, new_tokens=8, batch_size=1)
    monkeypatch.setattr(decode_demo, "DecodeConfig", lambda **given: config)
    out = tmp_path / "results" / "decode_demo_cpu.json"
    options = ["--minutes", "0.1", "--models", "bytes", "--runs", str(tmp_path / "runs"), "--out", str(out)]
    options += ["--source", str(tmp_path / "corpus"), "--cache", str(tmp_path / "cache"), "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["decode_demo", *options])
    shown = []
    for _ in range(2):
        decode_demo.main()
        shown.append(capfd.readouterr().out)
    assert "tokens per second" in shown[0] and "has ended: using its model" not in shown[0]
    assert "tokens per second" not in shown[1] and "has ended: using its model" in shown[1]
    document = json.loads(out.read_text())
    rows = document["rows"]
    assert [(r["text"], r["heads"]) for r in rows] == [(t, k) for t in ("tyro", "rich") for k in (1, 2, 3)]
    assert all(r["same_texts"] == r["n_prompts"] == 4 and 5.0 < r["seconds"] < 60 for r in rows)
    assert all(1.0 <= r["tokens_per_forward"]["value"] <= r["heads"] for r in rows)
    assert rows[0]["speed"] == 1.0 and rows[0]["parameters"] > 10_000 and len(rows[0]["nats_per_byte"]) == 3
    assert out.with_suffix(".png").stat().st_size > 10_000
    assert "| heads used | tyro | rich | 7 B: bytes (S3) |" in shown[1]


def row(model: str, text: str, heads: int, n_future: int, low: float | None) -> dict[str, Any]:
    high = None if low is None else low + 0.2
    return {
        **{"benchmark": "decode_demo", "model": model, "parameters": 5_400_000, "variant": "replicated"},
        **{"n_future": n_future, "d_model": 256, "n_trunk_layers": 6, "step": 1500, "tokens": 3_000_000},
        **{"seconds": 1080.0, "text": text, "heads": heads, "speed": 0.9 * heads, "same_texts": 9, "n_prompts": 10},
        "tokens_per_forward": {"value": float(heads), "low": low, "high": high},
    }


def test_the_page_puts_the_papers_figures_beside_ours(tmp_path: Path) -> None:
    rows = [row("tokens", text, k, 4, k - 0.1) for text in ("torch.nn", "rich") for k in (1, 2, 3, 4)]
    rows += [row("bytes", "rich", k, 8, None if k == 1 else k - 0.1) for k in (1, 2, 8)]
    path = tmp_path / "decode_demo_cpu.json"
    path.write_text(json.dumps({"env": {"cpu": "a CPU", "threads": 2, "torch": "2.13.0"}, "rows": rows}))
    text = demo_section(path, tmp_path)
    four = "| 4 | 3.60 / 4.00 (3.90 to 4.10) | 3.60 / 4.00 (3.90 to 4.10) | 3.05 / 3.50 | 2.74 / 3.12 | 2.67 / 3.09 |"
    assert four in text
    assert "| 8 | 7.20 / 8.00 (7.90 to 8.10) | 6.39 / 7.04 |" in text
    assert "| 1 | 0.90 / 1.00 | 1.00 / 1.00 |" in text
    assert "5.4 M parameters" in text and "1,500 steps" in text and "in 18.0 minutes" in text
    assert "Speed over tokens per forward with all heads is 0.90 (paper: 0.87)" in text
    assert "in 72 of 80 continuations" in text and "say nothing of the acceptance of a large model" in text
    assert (tmp_path / "decode_demo_cpu.png").stat().st_size > 10_000


@pytest.mark.slow
def test_rounds_of_every_number_of_drafts_stand_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "decode_rounds_cpu.json"
    monkeypatch.setattr("sys.argv", ["decode_rounds", "--quick", "--new-tokens", "4", "--out", str(out)])
    decode_rounds.main()
    rows = json.loads(out.read_text())["rows"]
    assert [(r["dtype"], r["batch"], r["n_draft"]) for r in rows] == [
        (dtype, batch, k) for dtype in ("float32", "bfloat16") for batch in (1, 8) for k in range(4)
    ]
    lines = [line for line in rounds_section(out).splitlines() if line.startswith("| parallel")]
    assert len(lines) == 4
    for line, first in zip(lines, rows[::4], strict=True):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert cells[2:4] == [first["dtype"], f"{first['batch']}"]
        assert cells[4] == f"{1e3 * first['seconds_per_round']:.2f}" and len(cells) == 8
