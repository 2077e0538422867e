"""Trains the paper's five architectures at equal parameters and steps, the analogue of its table S4.

``python -m benchmarks.studies.train_variants --out benchmarks/results/train_variants.json`` takes half an hour on two
cores; ``python -m benchmarks.pages.performance`` then generates the table.

All have the same width and the same total number of layers; the width of the feed-forward layers makes their parameter
counts equal within one percent. Every run is a separate process (``mtp train``), to measure its own peak memory.
Results are written after every run, and runs already in the file are skipped, so the command can be restarted.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.machine import describe
from benchmarks.harness.runner import write_atomically
from benchmarks.suites.variants import PAPER_VARIANTS
from mtp_ext.nn import MTPConfig
from mtp_ext.train.config import (
    BatchConfig,
    CheckpointConfig,
    EvaluationConfig,
    LoggingConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
)
from mtp_ext.train.config_file import write_config
from mtp_ext.train.data import DataConfig, prepare_data
from mtp_ext.train.report.record import METRICS_FILE, read_metrics
from mtp_ext.train.run import default_cache

N_FUTURE, WIDTH, LAYERS, VOCABULARY = 4, 192, 6, "bpe:1024"
FF_STEP = 2


def equal_shape(variant: str, vocab_size: int, like: MTPConfig) -> MTPConfig:
    """Returns ``like`` as ``variant``, with the feed-forward width that matches its parameter count most closely."""
    target = like.parameter_counts()["total"]
    shapes = [
        dataclasses.replace(like, variant=variant, vocab_size=vocab_size, d_ff=ff_dim)
        for ff_dim in range(FF_STEP, 2 * like.ff_dim, FF_STEP)
    ]
    return min(shapes, key=lambda shape: abs(shape.parameter_counts()["total"] - target))


def model_of(variant: str, vocab_size: int) -> MTPConfig:
    parallel = MTPConfig(vocab_size, WIDTH, LAYERS, WIDTH // 64, n_future=N_FUTURE)
    return parallel if variant == "parallel" else equal_shape(variant, vocab_size, parallel)


def config_of(shape: MTPConfig, seed: int, args: argparse.Namespace, out: Path) -> TrainConfig:
    quick = args.quick
    return TrainConfig(
        out=out,
        max_steps=args.steps,
        seed=seed,
        device="cpu",
        precision="float32",
        threads=torch.get_num_threads(),
        cache=args.cache,
        model=ModelConfig(
            n_future=N_FUTURE,
            variant=shape.variant,
            d_model=WIDTH,
            n_layers=LAYERS,
            n_attn_heads=shape.n_attn_heads,
            d_ff=shape.ff_dim,
        ),
        data=DataConfig(source=tuple(args.source), tokenizer=VOCABULARY),
        batch=BatchConfig(seq_len=32 if quick else 256, batch_size=4),
        optim=OptimConfig(),
        evaluation=EvaluationConfig(every_steps=0, final_batches=4 if quick else 24),
        checkpoint=CheckpointConfig(every_seconds=0, keep_last=1),
        logging=LoggingConfig(every_steps=max(1, args.steps // 20), tensorboard=False, plots=False, sample_tokens=0),
    )


def run_once(variant: str, seed: int, vocab_size: int, args: argparse.Namespace) -> dict[str, Any]:
    """Trains once in a separate process and returns its final records."""
    shape = model_of(variant, vocab_size)
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory, "run")
        write_config(config_of(shape, seed, args, out), Path(directory))
        command = [sys.executable, "-m", "mtp_ext", "train", "--config", str(Path(directory, "config.toml"))]
        start = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - start
        records = list(read_metrics(out / METRICS_FILE))
    train = [r for r in records if r["kind"] == "train"]
    final = records[-1]
    if not final.get("final"):
        raise RuntimeError(f"the run of {variant} with seed {seed} ended without its validation")
    keys = ("head_loss", "nats_per_byte", "top1", "accept_length")
    return {
        "benchmark": "train_variants",
        "variant": variant,
        "seed": seed,
        "steps": args.steps,
        "tokens": final["tokens"],
        "parameters": shape.parameter_counts()["total"],
        "d_ff": shape.ff_dim,
        "trunk_layers": shape.n_trunk_layers,
        "seconds": round(seconds, 1),
        "tokens_per_second": train[-1]["tokens_per_second"],
        "peak_bytes": train[-1]["memory_bytes"],
        "first_head_loss": train[0]["head_loss"],
        **{key: final[key] for key in keys},
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file, rewritten after every run")
    parser.add_argument("--steps", type=int, help="optimiser steps of a run (default: 400; 3 with --quick)")
    parser.add_argument("--seeds", type=int, nargs="+", help="default: 0 1 2; 0 1 with --quick")
    parser.add_argument("--variants", nargs="+", default=list(PAPER_VARIANTS), choices=PAPER_VARIANTS)
    parser.add_argument("--source", nargs="+", default=["stdlib"], help="what to train on, as mtp train --data.source")
    parser.add_argument("--threads", type=int, help="torch's threads (default: torch's own choice)")
    parser.add_argument("--cache", type=Path, default=default_cache(), help="directory of tokenised corpora")
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it works; numbers mean nothing")
    args = parser.parse_args()
    args.steps = args.steps or (3 if args.quick else 400)
    args.seeds = args.seeds or ([0, 1] if args.quick else [0, 1, 2])
    return args


def main() -> None:
    args = arguments()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    done = json.loads(args.out.read_text())["rows"] if args.out.exists() else []
    found = {(r["variant"], r["seed"], r["steps"]) for r in done}
    data = prepare_data(DataConfig(source=tuple(args.source), tokenizer=VOCABULARY), args.cache)
    document: dict[str, Any] = {"env": describe("cpu"), "rows": done}
    # Seeds in the outer loop, so that drifts of the machine affect all variants alike.
    for seed in args.seeds:
        for variant in args.variants:
            if (variant, seed, args.steps) in found:
                continue
            document["rows"].append(run_once(variant, seed, data.tokenizer.vocab_size, args))
            write_atomically(args.out, document)
            row = document["rows"][-1]
            losses = " ".join(f"{loss:.3f}" for loss in row["head_loss"])
            print(
                f"seed {seed}  {variant:<12} {row['parameters'] / 1e6:.2f} M  loss per head {losses}  accept "
                f"{row['accept_length']:.2f}  {row['tokens_per_second']:,.0f} tokens/s  {row['seconds']:.0f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
