"""What of the tokens per forward arrives as wall clock: rounds with 0 to n - 1 drafts, for models of random weights.

``python -m benchmarks.studies.decode_rounds --out benchmarks/results/decode_rounds_cpu.json``; each model as
``mtp bench decode`` measures it. Heads with a layer are measured under a trunk of 8 layers, the fewest for which the
figure means something, and of 24. Replicated unembeddings have a vocabulary of bytes, as in the paper.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.machine import describe
from benchmarks.harness.runner import write_atomically
from mtp_ext.cli.bench_decode import DecodeBench
from mtp_ext.train.metrics import finite

MODELS: tuple[dict[str, Any], ...] = (
    {"variant": "parallel", "n_layers": 12, "vocab_size": 4096},
    {"variant": "parallel", "n_layers": 28, "vocab_size": 4096},
    {"variant": "linear", "n_layers": 12, "vocab_size": 4096},
    {"variant": "linear", "n_layers": 28, "vocab_size": 4096},
    {"variant": "replicated", "n_layers": 28, "vocab_size": 256},
)
SMALL = ({"variant": "parallel", "n_layers": 6, "vocab_size": 64, "d_model": 32, "n_attn_heads": 2},)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file, rewritten after every model")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--new-tokens", type=int, default=25)
    parser.add_argument("--device", default="auto", help="as mtp bench decode --device")
    parser.add_argument("--quick", action="store_true", help="a tiny model, to see that it works")
    args = parser.parse_args()
    document: dict[str, Any] = {"env": describe("cuda" if torch.cuda.is_available() else "cpu"), "rows": []}
    for shape in SMALL if args.quick else MODELS:
        for dtype in args.dtypes:
            bench = DecodeBench(
                **shape, dtype=dtype, new_tokens=args.new_tokens, repetitions=2, device=args.device, acceptance=()
            )
            measured = bench.measured()
            for row in measured["results"]:
                facts = {key: measured["model"][key] for key in ("variant", "n_layers", "d_model", "vocab_size")}
                document["rows"].append(finite({"benchmark": "decode_rounds", **facts, "dtype": dtype, **row}))
                name = " ".join(f"{facts[key]}" for key in ("variant", "n_layers"))
                times = f"{1e3 * row['seconds_per_round']:.2f} ms, {row['speed_per_token']:.2f}"
                print(f"{name} {dtype}, batch {row['batch']}, {row['n_draft']} drafts: {times}", flush=True)
            write_atomically(args.out, document)


if __name__ == "__main__":
    main()
