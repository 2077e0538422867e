"""``mtp bench decode``: times rounds of decoding with every number of drafts."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from mtp_ext.cli.evaluate import EvaluateCommand, prepare
from mtp_ext.generate.measure import DecodingMeasurement, measure_decoding
from mtp_ext.nn import MTPConfig, MTPModel
from mtp_ext.train.checkpoint.saved_model import load_saved_model
from mtp_ext.train.config import check_at_least
from mtp_ext.train.data.dataset import VALIDATION
from mtp_ext.train.device import choose_compute
from mtp_ext.train.evaluation.decoding import choose_prompts
from mtp_ext.train.metrics import finite, shown
from mtp_ext.train.report.plots import plot_round_cost


@dataclass(frozen=True)
class DecodeBench:
    """Time rounds of decoding with 0 to n - 1 drafts, which take turns in one process; times are medians.

    Drafts make decoding faster by the tokens per forward times "speed / tokens per forward": the time of a round
    without drafts over that of one with them, 1 if drafts were free.
    """

    checkpoint: Path | None = None
    """Directory of a checkpoint or of a run, which decodes its held-out text (default: random weights and prompts)."""
    variant: str = "parallel"
    """Architecture of random heads."""
    d_model: int = 512
    """Width D of the random model."""
    n_layers: int = 12
    """Its transformer layers, of trunk and heads."""
    n_attn_heads: int = 8
    """Its attention heads per layer."""
    vocab_size: int = 32_000
    """Its classes V."""
    n_future: int = 4
    """Its heads n."""
    batch_sizes: tuple[int, ...] = (1, 8)
    """Prompts that are decoded together."""
    prompt_tokens: int = 128
    """Tokens of a prompt."""
    new_tokens: int = 64
    """Tokens to add to each."""
    repetitions: int = 3
    """Batches of each size that each number of drafts decodes."""
    trees: tuple[str, ...] = ()
    """Trees of drafts to time as well, such as 3,2,1: numbers of drafts by position."""
    acceptance: tuple[float, ...] | None = None
    """Probabilities that a draft is accepted after those before it, for which to compute tokens per second (default:
    0.6 0.8 1.0; none for a checkpoint, which has its own)."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the weights."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ..., or auto: a GPU if there is one."""
    json: bool = False
    """Print the numbers as JSON."""
    out: Path | None = None
    """Also write decode.json and decode.png into this directory."""

    def __post_init__(self) -> None:
        if not self.batch_sizes:
            raise ValueError("batch_sizes must name at least one number of prompts, got none")
        if min(self.batch_sizes) < 1:
            raise ValueError(f"batch_sizes must be at least 1, got {min(self.batch_sizes)}")
        check_at_least(1, "", self, "prompt_tokens", "repetitions")
        check_at_least(2, "", self, "new_tokens")
        for chance in self.acceptance or ():
            if not 0 <= chance <= 1:
                raise ValueError(f"acceptance must be in [0, 1], got {chance}")

    @property
    def _chances(self) -> tuple[float, ...]:
        """The acceptance, with the default filled in."""
        if self.acceptance is not None:
            return self.acceptance
        return (0.6, 0.8, 1.0) if self.checkpoint is None else ()

    def run(self) -> int:
        """Runs the benchmark; returns the exit code."""
        if self.out is not None:
            self.out.mkdir(parents=True, exist_ok=True)
        document = self.measured()
        rows = document["results"]
        text = json.dumps(finite(document), indent=None if self.out is None else 2)
        if self.out is not None:
            (self.out / "decode.json").write_text(text + "\n", encoding="utf-8")
            chains = [row for row in rows if not row["tree"]]
            shares = {f"batch {b}": [r["speed_per_token"] for r in chains if r["batch"] == b] for b in self.batch_sizes}
            plot_round_cost(shares, self.out / "decode.png")
        if self.json:
            print(text)
        else:
            Console().print(self._table(document))
        return 0

    def measured(self) -> dict[str, Any]:
        """Measures all batch sizes and numbers of drafts; returns the record, with a row of ``results`` for each."""
        compute = choose_compute(self.device, "float32")
        model, prompts = self._model_and_prompts(compute.device)
        n_drafts = [*range(model.config.n_future), *map(parsed_tree, self.trees)]
        rows: list[dict[str, Any]] = []
        for batch_size in self.batch_sizes:
            filled = list(islice(cycle(prompts), batch_size * self.repetitions))
            measured = measure_decoding(model, filled, self.new_tokens, n_drafts, batch_size=batch_size)
            rows += [self._row(batch_size, one, measured[0]) for one in measured]
        device = torch.cuda.get_device_name(compute.device) if compute.device.type == "cuda" else "CPU"
        return {
            "model": model.config.to_dict(),
            **{name: getattr(self, name) for name in ("dtype", "prompt_tokens", "new_tokens", "repetitions")},
            **{"checkpoint": None if self.checkpoint is None else str(self.checkpoint), "device": device},
            **{"threads": torch.get_num_threads(), "torch": torch.__version__, "results": rows},
        }

    def _model_and_prompts(self, device: torch.device) -> tuple[MTPModel, list[Tensor]]:
        """Loads or makes the model, and prompts on its device."""
        count = self.repetitions * max(self.batch_sizes)
        if self.checkpoint is None:
            torch.manual_seed(0)
            length = self.prompt_tokens + self.new_tokens
            names = ("vocab_size", "d_model", "n_layers", "n_attn_heads", "n_future", "variant")
            shape = {name: getattr(self, name) for name in names}
            model = MTPModel(MTPConfig(**shape, max_seq_len=length)).to(device)
            prompts = [*torch.randint(self.vocab_size, (count, self.prompt_tokens))]
        else:
            saved = load_saved_model(self.checkpoint, device)
            split = prepare(EvaluateCommand(self.checkpoint), saved).split(VALIDATION)
            model, prompts = saved.model, choose_prompts(split, count, self.prompt_tokens, self.new_tokens)
        return model.to(getattr(torch, self.dtype)), [prompt.to(device) for prompt in prompts]

    def _row(self, batch_size: int, measured: DecodingMeasurement, plain: DecodingMeasurement) -> dict[str, Any]:
        """Makes the record of one number of drafts."""
        seconds = measured.seconds_per_round
        chances = () if measured.tree else self._chances  # of a tree's alternatives nothing is assumed
        expected = {a: sum(a**i for i in range(1 + measured.n_draft)) for a in chances}
        return {
            "batch": batch_size,
            **measured.as_dict(),
            "time_ratio": seconds / plain.seconds_per_round,
            "speed_per_token": plain.seconds_per_round / seconds,
            "tokens_per_second_at": {f"{a:g}": batch_size * n / seconds for a, n in expected.items()},
        }

    def _table(self, document: dict[str, Any]) -> Table:
        """Formats a record for a terminal."""
        model, rows = document["model"], document["results"]
        shape = (
            f"n = {model['n_future']}, {model['n_layers']} layers, D = {model['d_model']}, V = {model['vocab_size']}"
        )
        title = f"rounds of decoding: {model['variant']}, {shape}, {self.dtype}, {document['device']}"
        caption = "tok/fwd: tokens per forward; a: how often a draft is accepted after those before it"
        table = Table(title=title, title_justify="left", caption=caption, caption_justify="left")
        own = [] if self.checkpoint is None else ["tok/fwd", "tokens/s"]
        at = [f"tokens/s\na = {a:g}" for a in self._chances]
        for heading in ("batch", "drafts", "ms per\nround", "time\nratio", "speed /\ntok/fwd", *own, *at):
            table.add_column(heading, justify="right")
        for row in rows:
            drafts = ",".join(map(str, row["tree"])) or f"{row['n_draft']}"
            cells = [f"{row['batch']}", drafts, shown(1e3 * row["seconds_per_round"], ".2f")]
            cells += [shown(row["time_ratio"], ".2f"), shown(row["speed_per_token"], ".2f")]
            if own:
                cells += [
                    shown(row["tokens_per_forward"]["value"], ".2f"),
                    shown(row["tokens_per_second"], ",.0f"),
                ]
            table.add_row(*cells, *(f"{speed:,.0f}" for speed in row["tokens_per_second_at"].values()))
        return table


def parsed_tree(text: str) -> tuple[int, ...]:
    """Reads a tree of drafts, such as "3,2,1"."""
    try:
        return tuple(int(count) for count in text.split(","))
    except ValueError:
        raise ValueError(f"trees must be numbers with commas between them, such as 3,2,1, got {text!r}") from None
