"""Runs a training run from its configuration to its final report."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console

from mtp_ext.distributed.ranks import Ranks
from mtp_ext.generate.measure import DecodingMeasurement
from mtp_ext.nn import MTPModel
from mtp_ext.train.checkpoint.directory import Checkpoint, list_checkpoints
from mtp_ext.train.checkpoint.resume import hold_run
from mtp_ext.train.checkpoint.saved_model import find_dataset
from mtp_ext.train.config import TrainConfig
from mtp_ext.train.config_file import write_config
from mtp_ext.train.data import Dataset, prepare_data
from mtp_ext.train.device import Compute, choose_compute
from mtp_ext.train.evaluation.decoding import compare_with_drafts
from mtp_ext.train.evaluation.evaluate import Evaluation
from mtp_ext.train.initial_weights import load_initial_weights
from mtp_ext.train.loop import Loop, TrainingFailedError, reason
from mtp_ext.train.progress import Ending
from mtp_ext.train.report import summary
from mtp_ext.train.report.display import Display
from mtp_ext.train.report.plots import plot_run
from mtp_ext.train.report.record import MetricsWriter
from mtp_ext.train.report.sample import choose_held_out, continue_text
from mtp_ext.train.trainer import Trainer

REMEDY = "restore it, name with --data.source where it or its tokens are, or start a new run"


@dataclass(frozen=True)
class Outcome:
    """The result of a run.

    Attributes:
        directory: The run's directory.
        checkpoint: Its last checkpoint.
        ending: How its loop ended.
        evaluation: The final validation; ``None`` if the run was stopped or nothing is held out.
        decoding: Held-out prompts continued without and with drafts; empty if the run was stopped, or cannot draft.
    """

    directory: Path
    checkpoint: Path
    ending: Ending
    evaluation: Evaluation | None
    decoding: Sequence[DecodingMeasurement]


def default_cache() -> Path:
    """Returns the default directory of tokenised corpora: ``$XDG_CACHE_HOME/mtp_ext`` or ``~/.cache/mtp_ext``."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "mtp_ext"


def train(config: TrainConfig, checkpoint: Checkpoint | None, console: Console, ranks: Ranks | None = None) -> Outcome:
    """Trains, evaluates, shows and records a run.

    Args:
        config: The run, with at least one limit.
        checkpoint: The checkpoint to continue from; ``None`` starts a new run.
        console: The console to print to.
        ranks: The processes that train together; the main one writes and prints. Default this one alone.
    Raises:
        ValueError: The configuration is inconsistent or does not fit the data, the machine or the checkpoint.
        TrainingFailedError: The loss is not finite, or anything else failed; the message names the last checkpoint.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    ranks = ranks or Ranks()
    compute = choose_compute(_device_of(config.device, ranks), config.precision)
    if config.cache is not None:
        config = replace(config, cache=config.cache.absolute())  # recorded for a resume from another directory
    if not ranks.is_main:
        console = Console(quiet=True, force_terminal=False)
    with hold_run(config.out, checkpoint) if ranks.is_main else nullcontext() as held:
        directory = ranks.from_main(lambda: held)
        assert directory is not None
        return _train(config, checkpoint, console, compute, directory, ranks)


def _device_of(device: str, ranks: Ranks) -> str:
    """Returns the device option of this process; where several take GPUs, chooses and returns its own."""
    if ranks.size > 1 and device in ("auto", "cuda") and torch.cuda.is_available():
        torch.cuda.set_device(ranks.local_rank)  # on which FSDP2 shards
        return f"cuda:{ranks.local_rank}"
    return device


def _train(
    config: TrainConfig,
    checkpoint: Checkpoint | None,
    console: Console,
    compute: Compute,
    directory: Path,
    ranks: Ranks,
) -> Outcome:
    """Trains in a directory that is locked for the run."""
    display = Display(console)
    cache, initial = config.cache or default_cache(), None
    if config.init_from is not None and checkpoint is None:
        initial = load_initial_weights(config.init_from, config.model.longest(config.batch.seq_len))
    with ranks.main_first():  # the others find the tokens that it wrote
        if checkpoint is None:
            dataset = prepare_data(config.data, cache)
        else:
            dataset = find_dataset(checkpoint, config.data, cache, REMEDY)
    torch.manual_seed(config.seed)
    model = MTPModel(config.model.build(dataset.tokenizer.vocab_size, config.batch.seq_len))
    if initial is not None:
        initial.load_into(model, dataset.tokenizer)
    trainer = Trainer(config, directory, dataset, model.to(compute.device), compute, ranks)
    if checkpoint is not None:
        trainer.load(checkpoint)
    if ranks.is_main:
        write_config(config, directory)
        (directory / summary.SUMMARY_FILE).unlink(missing_ok=True)  # of an earlier part of the run
    display.say(_headline(dataset, model, trainer.describe_devices(), directory))
    if initial is not None:
        unknown = "" if initial.tokenizer else " (no tokenizer.json beside them to compare)"
        display.say(f"weights    from {initial.origin}{unknown}")
    n_tokens, seq_len = dataset.split("train").n_tokens, config.batch.seq_len
    if seq_len > n_tokens:
        display.say(
            f"warning: batch.seq_len {seq_len} exceeds the {n_tokens} tokens of the training split; the rest of every "
            "row is padding"
        )
    if checkpoint is not None:
        display.say(f"continuing {checkpoint.path} after step {checkpoint.step}")
    resumed_step = trainer.progress.step
    recorded = directory if ranks.is_main else None
    with MetricsWriter(recorded, resumed_step=resumed_step, tensorboard=config.logging.tensorboard) as record:
        with display:
            ending = Loop(trainer, record, display).run()
        path = ranks.from_main(lambda: list_checkpoints(trainer.checkpoints)[-1].path)
        try:
            evaluation = None if ending.received else _validate(trainer, record, display)
            whole = trainer.model if ending.received else trainer.whole_model()
            decoding = [] if ending.received or not ranks.is_main else _decode(trainer, whole, display)
            outcome = Outcome(directory, path, ending, evaluation, decoding)
            if ranks.is_main:
                _show(trainer, whole, outcome, console)
        except Exception as error:
            raise TrainingFailedError(
                f"training ended with the checkpoint {path}, but the final report failed ({reason(error)})"
            ) from error
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"training ended with the checkpoint {path}") from None
    return outcome


def _validate(trainer: Trainer, record: MetricsWriter, display: Display) -> Evaluation | None:
    """Validates at the end of a run, if anything is held out."""
    if not trainer.has_validation:
        return None
    display.say("validating on the held-out split")
    evaluation = trainer.evaluate(trainer.config.evaluation.final_batches)
    record.write("validation", trainer.progress.step, {**trainer.position(), **evaluation.as_dict(), "final": True})
    return evaluation


def _decode(trainer: Trainer, model: MTPModel, display: Display) -> list[DecodingMeasurement]:
    """Decodes held-out text without and with drafts at the end of a run, if it shows a sample."""
    if not trainer.config.logging.sample_tokens:
        return []
    display.say("decoding held-out text without and with drafts")
    return compare_with_drafts(model, trainer.dataset, trainer.config.batch.seq_len)


def _headline(dataset: Dataset, model: MTPModel, device: str, directory: Path) -> str:
    """Formats the corpus, model, device and directory of the run."""
    config, train = model.config, dataset.split("train")
    parameters = sum(p.numel() for p in model.parameters())
    skipped = "; ".join(f"{count} {reason}" for reason, count in dataset.manifest["inputs"]["skipped"].items())
    left_out = f"left out   {skipped}\n" if skipped else ""
    return (
        f"corpus     {train.n_bytes / 1e6:.1f} MB in {train.n_documents:,} documents, {train.n_tokens:,} tokens of "
        f"{train.bytes_per_token:.2f} bytes, vocabulary {config.vocab_size:,}\n"
        f"{left_out}"
        f"model      {parameters / 1e6:.2f} M parameters: {config.n_trunk_layers} trunk layers and {config.n_future} "
        f"{config.variant} heads of width {config.d_model}\n"
        f"on         {device}\n"
        f"run        {directory}"
    )


def _show(trainer: Trainer, model: MTPModel, outcome: Outcome, console: Console) -> None:
    """Prints the tables, the sample and the paths, and draws the plots."""
    config, ending = trainer.config, outcome.ending
    if ending.received is not None:
        console.print(
            f"stopped by {ending.received.name} after step {trainer.progress.step}; continue with: "
            f"mtp train --resume {outcome.directory}",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
        return
    plots = plot_run(outcome.directory) if config.logging.plots else []
    facts = summary.run_facts(ending, trainer.progress, trainer.stream.epochs, trainer.describe_devices())
    if outcome.evaluation is not None:
        console.print(summary.evaluation_table(outcome.evaluation))
        facts.insert(0, summary.accept_line(outcome.evaluation))
    if outcome.decoding:
        facts[1:1] = summary.comparison_facts(*outcome.decoding)
    summary.write_summary(outcome.directory, ending, trainer.progress, outcome.evaluation, outcome.decoding)
    console.print(summary.facts_table(facts))
    held_out = choose_held_out(trainer.dataset) if config.logging.sample_tokens else None
    if held_out is not None:
        tokens = config.logging.sample_tokens
        text = continue_text(model, trainer.dataset.tokenizer, held_out.prompt, tokens, config.seed)
        console.print(summary.sample_panel(held_out, text))
    summary.print_paths(console, outcome.checkpoint, plots, outcome.directory)
