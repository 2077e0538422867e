"""What docs/results/performance.md will say of a GPU: from rows as the benchmarks write them, of no device."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.pages import gpu_sections, performance

ENV = {
    "cpu": "a CPU",
    "threads": 16,
    "torch": "2.11.0",
    "torch_cuda": "13.0",
    "commit": "0123456789abcdef",
    "dirty": False,
    "gpu": {"name": "a made-up GPU", "driver": "1.2"},
}


@pytest.fixture(autouse=True)
def docs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for module in ("tables", "gpu_sections", "performance"):
        monkeypatch.setattr(f"benchmarks.pages.{module}.DOCS", tmp_path / "docs")
    (tmp_path / "docs").mkdir()
    return tmp_path / "docs"


def written(tmp_path: Path, name: str, rows: list[dict[str, Any]], **env: Any) -> Path:
    path = tmp_path / name
    path.write_text(json.dumps({"env": ENV | env, "rows": rows}))
    return path


def loss_rows() -> list[dict[str, Any]]:
    shape = {"benchmark": "gpu_loss", "N": 16384}
    gpu = {"sm_mhz_median": 1755, "process_bytes_max": None, "device_bytes_max": 3 << 30}
    rows: list[dict[str, Any]] = []
    for width, vocab, n in ((4096, 128256, 1), (4096, 128256, 4), (1024, 128256, 1)):
        for impl, ratio in (("gemms", 1.0), ("mtp_ext", 0.9)):
            rows.append(
                {**shape, "D": width, "V": vocab, "n": n, "impl": impl, "ms_median": 70.0 / ratio}
                | {"baseline_ratio": ratio, "gflop_per_s": 700e3, "peak_extra_bytes": 1 << 30, "gpu": gpu}
            )
    failed = {"impl": "eager", "error": "OutOfMemoryError: 4 GiB | 1 free", "peak_extra_bytes": None}
    return [*rows, {**shape, "D": 8192, "V": 128256, "n": 1, **failed}]


def test_the_loss_stands_next_to_its_bars(tmp_path: Path, docs: Path) -> None:
    text = gpu_sections.gpu_loss_section(written(tmp_path, "gpu_loss_x.json", loss_rows()))
    assert "a made-up GPU, driver 1.2, CUDA 13.0, torch 2.11.0, commit 0123456789 ([JSON]" in text
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    assert any(
        "| 4096 | 128256 | 4 | mtp_ext |" in x and "| 0.9 | 0.95 | 700 | 1024 | 3072 | 1755 |" in x for x in lines
    )
    assert any("| 1024 | 128256 | 1 | mtp_ext |" in x and "| 0.9 | - | 700 |" in x for x in lines), "it has no bar"
    assert any("| eager | OutOfMemoryError: 4 GiB / 1 free | - | 0.96 | - | - |" in x for x in lines)
    assert len({x.count("|") for x in lines}) == 1
    assert (docs / "gpu_loss_x.png").stat().st_size > 10_000


def test_rows_without_a_target_have_a_table_of_their_own(tmp_path: Path) -> None:
    row = {"benchmark": "gpu_half_ignored", "N": 16384, "D": 4096, "V": 32000, "peak_extra_bytes": 1 << 30}
    rows = [{**row, "impl": "max_valid", "ms_median": 9.5, "baseline_ratio": 1.9}]
    text = gpu_sections.gpu_loss_section(written(tmp_path, "gpu_loss_x.json", loss_rows() + rows))
    assert "| 16384 | 4096 | 32000 | max_valid | 9.5 | 1.9 | 1024 |" in text
    assert "every other row" not in gpu_sections.gpu_loss_section(written(tmp_path, "gpu_loss_x.json", loss_rows()))


def test_a_file_without_a_measured_shape_still_has_a_section(tmp_path: Path) -> None:
    text = gpu_sections.gpu_loss_section(written(tmp_path, "gpu_loss.json", loss_rows()[-1:], dirty=True))
    assert "OutOfMemoryError" in text and "with uncommitted changes" in text


def test_the_bandwidths(tmp_path: Path) -> None:
    row = {"impl": "mtp_ext", "ms_median": 0.5, "gb_per_s": 2500.0, "baseline_ratio": 0.88, "peak_extra_bytes": None}
    rows = [{"benchmark": "row_pass", "R": 4096, "V": 32000, **row}]
    rows += [{"benchmark": "decode", "R": 4, "D": 4096, "V": 128256, **row}]
    text = gpu_sections.row_pass_section(written(tmp_path, "row_pass_x.json", rows))
    assert "| 4096 | 32000 | mtp_ext | 0.5 | 2500.0 | 0.88 | - |" in text
    assert "| 4 | 4096 | 128256 | mtp_ext | 0.5 | 2500.0 | 0.88 | - |" in text


def test_heads_together(tmp_path: Path) -> None:
    shape = {"N": 4096, "n": 4, "D": 1024, "dtype": "bfloat16", "ms_median": 0.25, "peak_extra_bytes": None}
    rows = [
        {"benchmark": "linear_heads", **shape, "impl": "stacked", "baseline_ratio": 1.05, "gflop_per_s": 412e3},
        {"benchmark": "norm_heads", **shape, "impl": "mtp_ext", "baseline_ratio": 1.9, "gb_per_s": 2100.0},
    ]
    text = gpu_sections.heads_section(written(tmp_path, "gpu_heads_x.json", rows))
    assert "| 4096 | 4 | 1024 | stacked | 0.25 | 1.05 | 412 | - |" in text
    assert "| 4096 | 4 | 1024 | mtp_ext | 0.25 | 1.9 | 2100.0 | - |" in text


def test_the_peers_and_who_is_absent(tmp_path: Path) -> None:
    shape = {"N": 8192, "D": 4096, "V": 128256, "dtype": "bfloat16", "peak_extra_bytes": 1 << 30}
    rows = [
        {**shape, "impl": "gemms", "ms_median": 30.0, "baseline_ratio": 1.0, "gflop_per_s": 860e3},
        {**shape, "impl": "liger", "ms_median": 60.0, "baseline_ratio": 0.5, "gflop_per_s": 430e3, "loss_error": 3e-4},
    ]
    path = written(tmp_path, "gpu_peers_x.json", rows, absent={"quack": "ModuleNotFoundError: No module named 'quack'"})
    text = gpu_sections.peers_section(path)
    assert "| 8192 | 4096 | 128256 | liger | 60.0 | 0.5 | 430 | 1024 | 3.0e-04 |" in text
    assert "| gemms | 30.0 | 1.0 | 860 | 1024 | - |" in text
    assert "- quack: not measured (ModuleNotFoundError: No module named 'quack')" in text


def test_a_steps_memory_says_which_device(tmp_path: Path) -> None:
    shape = {"B": 4, "S": 256, "D": 128, "V": 8192, "ms_median": 3.0}
    rows = [{**shape, "impl": i, "n": n, "peak_extra_bytes": n << 20} for i in ("joint", "sequential") for n in (1, 2)]
    rows.append({**shape, "impl": "autograd", "n": 1, "peak_extra_bytes": None})  # it had no room
    text = performance.memory_section(written(tmp_path, "step_memory_x.json", rows))
    assert "## Memory of a training step on a made-up GPU" in text
