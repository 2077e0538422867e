"""What the machine code predicts for an H100: a roofline of the row pass, and the ratios of the loss to its GEMMs.

Written by ``.ci/sass_gate.sh --write``. Nothing here is a measurement; the column "measured" is filled from the JSON of
the GPU benchmarks, once there is one.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "results" / "gpu-prediction.md"
ARCHITECTURE = "90a"  # the machine code that the page is about

# Value, unit, source.
CONSTANTS = {
    "multiprocessors": (132, "", "H100 SXM data sheet"),
    "clock": (1.755e9, "Hz", "assumed: typical under load; 1.98 GHz at most"),
    "copy": (3.0e12, "B/s", "assumed: achieved by a large copy; 3.35 TB/s on the data sheet"),
    "l2": (5.5e12, "B/s", "assumed, from published microbenchmarks"),
    "gemm": (760e12, "FLOP/s", "assumed: achieved by bf16 GEMMs; 989 on the data sheet"),
    "issue": (128, "lanes per clock and multiprocessor", "four schedulers, one instruction of 32 lanes each"),
    "mufu": (16, "lanes per clock and multiprocessor", "CUDA C++ programming guide, arithmetic throughput"),
    "shared": (128, "B per clock and multiprocessor", "published microbenchmarks"),
    "launch": (2.1e-6, "s", "published microbenchmarks"),
}
VALUE = {name: value for name, (value, _, _) in CONSTANTS.items()}

# Name, form of the kernel (Logits), exponentials and reciprocals per element, bytes of tables per element: a bias is
# read in each of three passes, class weights in two if labels are smoothed.
FORMS = (
    ("plain, logit scale, z-loss", 0, 2, 0),
    ("label smoothing", 1, 2, 0),
    ("bias", 1, 2, 12),
    ("bias, smoothing, class weights", 1, 2, 20),
    ("softcap, smoothing", 2, 6, 0),
    ("all of these", 2, 6, 20),
)
ROW_VOCABULARIES = (8192, 32000, 128256)
N_ROWS, FLOOR_CHUNK = 16384, 4096
# As benchmarks/suites/gpu_loss.py and benchmarks/pages/gpu_sections.py.
BARS = {(1024, 32000): 0.85, (4096, 32000): 0.95, (4096, 128256): 0.95, (8192, 128256): 0.96}
SHAPES = (*BARS, (1024, 128256), (8192, 32000))
CHUNKED = ((2048, 1024, 32000), (4096, 4096, 32000), (4096, 4096, 128256), (16384, 1024, 32000), (16384, 4096, 128256))

PLAIN = FORMS[0][0]
SHOWN = (PLAIN, "softcap, smoothing", "all of these")

Kernels = Mapping[str, tuple[int, Mapping[str, float]]]  # registers and issue slots by name


def kernel_name(form: int, blocks: int, threads: int) -> str:
    """The demangled name of a cached bfloat16 row kernel, without its parameters."""
    return f"mtp::loss_rows_cached_kernel<__nv_bfloat16, (mtp::Logits){form}, (mtp::Blocks){blocks}, {threads}>"


def variant(vocab: int) -> tuple[int, int]:
    """Clusters or not, and threads: as plan_cache of csrc/kernels/loss_rows.cu chooses for bfloat16."""
    if vocab > 36_000:
        return 1, 512
    return 0, 32 if vocab <= 2048 else 128 if vocab <= 8192 else 512


def row_seconds(vocab: int, slots: float, special: int, table_bytes: int) -> dict[str, float]:
    """Time of one bfloat16 row at each limit, as if nothing else limited it."""
    per_second = VALUE["multiprocessors"] * VALUE["clock"]
    return {
        "copy": vocab * 4 / VALUE["copy"],
        "L2": vocab * (4 + table_bytes) / VALUE["l2"],
        "issue": vocab * slots / (per_second * VALUE["issue"]),
        "MUFU": vocab * special / (per_second * VALUE["mufu"]),
        "shared memory": vocab * 6 / (per_second * VALUE["shared"]),
    }


def gemm_seconds(n_rows: int, width: int, vocab: int, chunk: int) -> float:
    """The three GEMMs. Every chunk writes the float32 gradient of the weight, every chunk but the first reads it."""
    chunks = -(-n_rows // chunk)
    return 6 * n_rows * width * vocab / VALUE["gemm"] + (8 * chunks - 4) * width * vocab / VALUE["copy"]


def loss_ratio(n_rows: int, width: int, vocab: int, chunk: int, row: float) -> float:
    """Time of the bare GEMMs, in the benchmark's chunks, over that of the loss; ``row`` is a row pass per row.

    Besides the GEMMs and the row pass the loss gathers the hidden states, scales their gradient in the backward, and
    converts the gradient of the weight, which the GEMM of a single chunk writes in bfloat16.
    """
    chunks = -(-n_rows // chunk)
    converted = 6 * width * vocab if chunks > 1 else -2 * width * vocab
    moved = (converted + (4 + 4) * n_rows * width) / VALUE["copy"]
    ours = gemm_seconds(n_rows, width, vocab, chunk) + n_rows * row + moved + 5 * chunks * VALUE["launch"]
    return gemm_seconds(n_rows, width, vocab, min(n_rows, FLOOR_CHUNK)) / ours


def measured(benchmark: str, **shape: int) -> str:
    """The ratio to the baseline in a committed result of the GPU, or nothing."""
    for path in sorted((ROOT / "benchmarks" / "results").glob(f"{benchmark}*.json")):
        document = json.loads(path.read_text())
        for row in document["rows"]:
            if document["env"].get("gpu") and row["impl"] == "mtp_ext" and shape.items() <= row.items():
                return f"{row['baseline_ratio']:.3f}"
    return ""


def table(*rows: Iterable[object]) -> str:
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    lines.insert(1, "|---" * lines[0].count(" | ") + "|---|")
    return "\n".join(lines) + "\n"


def code_table(kernels: Kernels) -> str:
    """Registers and issue slots of each form."""
    rows = []
    for name, form, _, _ in FORMS:
        registers, slots = kernels[kernel_name(form, 0, 512)]
        of_pass = (f"{slots[kind]:.2f}" for kind in ("fill", "sum", "gradient"))
        rows.append((name, registers, *of_pass, f"{sum(slots.values()):.1f}"))
    return table(("options", "registers", "read", "sum", "gradient", "in all"), *rows)


def row_times(kernels: Kernels) -> dict[tuple[str, int], dict[str, float]]:
    """Seconds of a row at each limit, by options and vocabulary."""
    times = {}
    for (name, form, special, table_bytes), vocab in itertools.product(FORMS, ROW_VOCABULARIES):
        _, slots = kernels[kernel_name(form, *variant(vocab))]
        times[name, vocab] = row_seconds(vocab, sum(slots.values()), special, table_bytes)
    return times


def pass_table(times: Mapping[tuple[str, int], Mapping[str, float]]) -> str:
    """The row pass against a copy."""
    rows = []
    for (name, vocab), seconds in times.items():
        limit = max(seconds, key=lambda x: seconds[x])
        reached = measured("row_pass", V=vocab) if name == PLAIN else ""
        rows.append((name, vocab, f"{seconds['copy'] / seconds[limit]:.2f}", limit, reached))
    return table(("options", "V", "predicted", "limit", "measured"), *rows)


def loss_table(times: Mapping[tuple[str, int], Mapping[str, float]]) -> str:
    """The loss against the bare GEMMs, on the default chunk."""
    rows = []
    for width, vocab in SHAPES:
        chunk = default_chunk(N_ROWS, width, vocab)
        every = (f"{loss_ratio(N_ROWS, width, vocab, chunk, max(times[x, vocab].values())):.3f}" for x in SHOWN)
        reached = measured("gpu_loss", N=N_ROWS, D=width, V=vocab)
        rows.append((width, vocab, chunk, *every, BARS.get((width, vocab), ""), reached))
    return table(("D", "V", "chunk", *(f"predicted: {name}" for name in SHOWN), "bar", "measured"), *rows)


def chunk_table(times: Mapping[tuple[str, int], Mapping[str, float]]) -> str:
    """The loss without options by the size of its chunks."""
    rows = []
    for n_rows, width, vocab in CHUNKED:
        sizes = (min(n_rows, 2048), min(n_rows, 4096), min(n_rows, 8192), n_rows)
        every = (f"{loss_ratio(n_rows, width, vocab, x, max(times[PLAIN, vocab].values())):.3f}" for x in sizes)
        rows.append((n_rows, width, vocab, default_chunk(n_rows, width, vocab), *every))
    return table(("N", "D", "V", "chosen", "2048", "4096", "8192", "one"), *rows)


def default_chunk(n_rows: int, width: int, vocab: int) -> int:
    from mtp_ext.ops.loss.chunk_size import chunk_size  # the gate itself needs no extension

    return chunk_size(n_rows, vocab, 2, chunk_rows=None, workspace_bytes=None, gpu_width=width, sum_width=width)


def write(kernels: Kernels) -> None:
    """Writes the page from the registers and issue slots of the kernels."""
    times = row_times(kernels)
    budget = VALUE["issue"] * 4 * VALUE["multiprocessors"] * VALUE["clock"] / VALUE["copy"]
    constants = ((name, f"{value:g}", unit, source) for name, (value, unit, source) in CONSTANTS.items())
    PAGE.write_text(
        f"""# Prediction for a GPU

Generated by `bash .ci/sass_gate.sh --write` from the machine code for sm_{ARCHITECTURE}; do not edit. **No number on
this page was measured on a GPU**, except those under "measured", where there are any: the JSON of
`benchmarks/on_gpu.sh` fills that column. A prediction takes the slowest of several limits, as if all else overlapped
with it, so it is a bound from above.

## Constants

{table(("name", "value", "unit", "source"), *constants)}
## Issue slots of the row kernel

Per element of a bfloat16 row, one block of 512 threads, on the longest way through each loop. At the bandwidth of a
copy a multiprocessor has {budget:.1f} slots per element.

{code_table(kernels)}
## Row pass

The predicted share of a copy's bandwidth, and what limits it. Latencies, and what a row costs besides its elements, are
left out, so that the figures of short rows say least.

{pass_table(times)}
## The loss at N = {N_ROWS}

The predicted ratio of the three bare GEMMs, in chunks of {FLOOR_CHUNK} rows, to the loss with both gradients, on the
default chunk.

{loss_table(times)}
## Choice of the chunk

The predicted ratio without options, by the rows of a chunk; "one" is a single chunk, which writes the
weight's gradient in the weight's dtype: up to D rows more than a chunk's limit share one.

{chunk_table(times)}"""
    )
    print(f"wrote {PAGE.relative_to(ROOT)}")
