"""Trains two small models and decodes packages that they have not seen: the analogue of the paper's tables S2 and S3.

``make decode-demo`` takes less than 45 minutes on two cores: 18 for each model (``--minutes``), then two or three for
decoding with every number of heads in turn. A run in ``--runs`` that has ended is used as it is, and one that was
stopped goes on. The JSON is rewritten after every text; ``python -m benchmarks.pages.performance`` adds the tables and
the plot to the page.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.machine import describe
from benchmarks.harness.runner import write_atomically
from benchmarks.pages.decode_sections import demo_section
from benchmarks.pages.tables import DOCS, RESULTS
from mtp_ext.cli.evaluate import EvaluateCommand, prepare
from mtp_ext.generate.measure import DecodingMeasurement
from mtp_ext.train.checkpoint.saved_model import SavedModel, load_saved_model
from mtp_ext.train.config import ModelConfig
from mtp_ext.train.device import choose_compute
from mtp_ext.train.evaluation.decoding import DecodeConfig, measure_on_split
from mtp_ext.train.metrics import finite
from mtp_ext.train.report.summary import SUMMARY_FILE
from mtp_ext.train.run import default_cache

# As in the paper, the byte model's heads are unembeddings alone and the other's are layers. Small, because two cores
# train on few tokens in minutes.
MODELS = {
    "tokens": (ModelConfig(n_future=4, variant="parallel", d_model=192, n_layers=12), "bpe:1024", 256),
    "bytes": (ModelConfig(n_future=8, variant="replicated", d_model=256, n_layers=6), "bytes", 512),
}
TEXTS = ("torch.nn", "numpy.lib", "rich")  # packages outside the standard library, which is what is trained on
DECODING_SECONDS_PER_MINUTE = 2.5  # for each text, per minute of training


def train(name: str, run: Path, args: argparse.Namespace) -> None:
    """Trains a model in a process of its own, unless its run has ended."""
    if (run / SUMMARY_FILE).exists():
        print(f"{run} has ended: using its model", flush=True)
        return
    model, tokenizer, seq_len = MODELS[name]
    options = {
        **{f"model.{key}": getattr(model, key) for key in ("n_future", "variant", "d_model", "n_layers")},
        **{"data.tokenizer": tokenizer, "batch.seq_len": seq_len, "batch.batch_size": 4},
        **{"evaluation.every_steps": 0, "evaluation.final_batches": 24, "logging.sample_tokens": 0},
        **{"max_seconds": 60 * args.minutes, "device": args.device, "cache": args.cache},
    }
    command = [sys.executable, "-m", "mtp_ext", "train", "--resume", "auto", "--out", str(run)]
    for key, value in options.items():
        command += [f"--{key.replace('_', '-')}", str(value)]
    command += ["--data.source", *args.source, *(["--threads", str(args.threads)] if args.threads else [])]
    subprocess.run(command, check=True)


def rows_of(name: str, text: str, run: Path, saved: SavedModel, measured: list[DecodingMeasurement]) -> list[Any]:
    """Makes a row for every number of heads."""
    summary = json.loads((run / SUMMARY_FILE).read_text())
    plain = measured[0]
    facts = {
        "benchmark": "decode_demo",
        "model": name,
        "parameters": saved.model.config.parameter_counts()["total"],
        **{key: getattr(saved.model.config, key) for key in ("variant", "n_future", "d_model", "n_trunk_layers")},
        **{key: summary[key] for key in ("step", "tokens", "seconds")},
        "nats_per_byte": (summary["validation"] or {}).get("nats_per_byte"),
        "text": text,
    }
    return [
        {
            **facts,
            "heads": 1 + drafted.n_draft,
            "speed": drafted.tokens_per_second / plain.tokens_per_second,
            "same_texts": drafted.same_texts(plain),
            **drafted.as_dict(),
        }
        for drafted in measured
    ]


def decode(name: str, run: Path, text: str, args: argparse.Namespace) -> list[Any]:
    """Decodes a package's source with every number of heads in turn, one prompt at a time."""
    saved = load_saved_model(run, choose_compute(args.device).device)
    (directory,) = importlib.util.find_spec(text).submodule_search_locations  # type: ignore[union-attr, misc]
    dataset = prepare(EvaluateCommand(run, source=(directory,)), saved)
    seq_len, n_drafts = saved.config.batch.seq_len, range(saved.model.config.n_future)
    config = DecodeConfig(prompts=200, prompt_tokens=seq_len // 2, new_tokens=seq_len // 4, batch_size=1)
    seconds = args.minutes * DECODING_SECONDS_PER_MINUTE
    measured = measure_on_split(saved.model, dataset, "validation", config, n_drafts, seconds)
    return rows_of(name, text, run, saved, measured)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=18.0, help="of training, for each model (default: 18)")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--runs", type=Path, default=Path("runs/decode-demo"), help="directory of the two runs")
    parser.add_argument(
        "--out", type=Path, help="the JSON file (default: benchmarks/results/decode_demo_<device>.json)"
    )
    parser.add_argument("--source", nargs="+", default=["stdlib"], help="what to train on, as mtp train --data.source")
    parser.add_argument("--device", default="auto", help="as mtp train --device")
    parser.add_argument("--threads", type=int, help="torch's threads (default: torch's own choice)")
    parser.add_argument("--cache", type=Path, default=default_cache(), help="directory of tokenised corpora")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    device = choose_compute(args.device).device.type
    out = args.out or RESULTS / f"decode_demo_{device}.json"
    document: dict[str, Any] = {"env": describe(device), "rows": []}
    for name in args.models:
        run = args.runs / name
        train(name, run, args)
        for text in TEXTS:
            print(f"decoding continuations of {text} with 1 to {MODELS[name][0].n_future} heads", flush=True)
            document["rows"] += finite(decode(name, run, text, args))
            write_atomically(out, document)
    print(demo_section(out, DOCS if args.out is None else out.parent))


if __name__ == "__main__":
    main()
