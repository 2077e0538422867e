"""A run in memory, and its way to the disk and back."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from mtp_ext.nn import MTPModel
from mtp_ext.train.checkpoint.directory import (
    Checkpoint,
    list_checkpoints,
    load_model_state,
    load_training_state,
    prune_checkpoints,
    write_checkpoint,
)
from mtp_ext.train.checkpoint.resume import CHECKPOINTS
from mtp_ext.train.checkpoint.saved_model import check_dataset, write_description
from mtp_ext.train.config import TrainConfig
from mtp_ext.train.data import Dataset, TrainingStream
from mtp_ext.train.device import Compute
from mtp_ext.train.evaluate import Evaluation, evaluate
from mtp_ext.train.optim import Optimizers
from mtp_ext.train.progress import Progress, learning_rate_factor
from mtp_ext.train.step import StepResult, train_step


class Trainer:
    """A run in memory: model, optimisers, data order, random generators and progress.

    Args:
        config: The run.
        directory: Where its records and checkpoints go.
        dataset: The tokenised corpus.
        model: The model, on its device.
        compute: Where and in what precision.
    """

    def __init__(
        self, config: TrainConfig, directory: Path, dataset: Dataset, model: MTPModel, compute: Compute
    ) -> None:
        self.config, self.dataset, self.model, self.compute = config, dataset, model, compute
        self.checkpoints = directory / CHECKPOINTS
        self.optimizers = Optimizers(model, config.optim)
        batch = config.batch
        self.stream = TrainingStream(
            dataset, "train", batch.seq_len, model.config.n_future, batch.batch_size, config.seed
        )
        self.progress = Progress()
        self.loss_weights = config.loss.weights(model.config.n_future)
        model.heads.recompute = config.loss.recompute
        self.has_validation = "validation" in dataset.splits

    def load(self, checkpoint: Checkpoint) -> None:
        """Takes the whole state of a checkpoint.

        Raises:
            ValueError: It was trained on another corpus or tokenizer.
        """
        check_dataset(checkpoint, self.dataset, "restore them to continue the run, or start a new one")
        state = load_training_state(checkpoint)
        self.model.load_state_dict(load_model_state(checkpoint))
        self.optimizers.load_state_dict(state["optimizers"])
        self.stream.load_state_dict(state["stream"])
        self.progress = Progress(**state["progress"])
        if "loss_weights" in state:  # checkpoints of before the weights changed over time have none
            self.loss_weights.load_state_dict(state["loss_weights"])
        torch.set_rng_state(state["rng"]["cpu"])
        if self.compute.device.type == "cuda" and state["rng"]["cuda"] is not None:
            torch.cuda.set_rng_state(state["rng"]["cuda"], self.compute.device)

    def save(self, validation_loss: float | None = None) -> Checkpoint:
        """Writes a checkpoint of this moment and deletes those that are no longer kept."""
        on_gpu = self.compute.device.type == "cuda"
        state = {
            "optimizers": self.optimizers.state_dict(),
            "stream": self.stream.state_dict(),
            "progress": self.progress.state_dict(),
            "loss_weights": self.loss_weights.state_dict(),
            "rng": {
                "cpu": torch.get_rng_state(),
                "cuda": torch.cuda.get_rng_state(self.compute.device) if on_gpu else None,
            },
        }
        checkpoint = write_checkpoint(
            self.checkpoints,
            self.progress.step,
            self.model.state_dict(),
            state,
            validation_loss=validation_loss,
            write_extra=lambda path: write_description(path, self.config, self.model.config, self.dataset),
        )
        settings = self.config.checkpoint
        prune_checkpoints(self.checkpoints, settings.keep_last, keep_best=settings.keep_best)
        return checkpoint

    def evaluate(self, batches: int) -> Evaluation:
        """Validates on at most ``batches`` batches; 0 takes the whole split."""
        return evaluate(
            self.model,
            self.dataset,
            self.compute,
            seq_len=self.config.batch.seq_len,
            batch_size=self.config.evaluation.batch_size,
            batches=batches,
            schedule=self.config.loss.schedule,
            head_weights=self.loss_weights.base,
        )

    def position(self) -> dict[str, float]:
        """Where the run is, for the record: tokens, passes over the training split, seconds of training."""
        return {"tokens": self.progress.tokens, "epochs": self.stream.epochs, "seconds": self.progress.seconds}

    @property
    def fraction(self) -> float:
        """The fraction of the run that is done."""
        return self.progress.fraction(self.config.limits)

    def step(self) -> StepResult:
        """Takes the next step.

        Raises:
            NotFiniteError: The loss or the gradient is not finite; the model is still that of the step before.
        """
        self.model.train()
        config, schedule, fraction = self.config, self.config.schedule, self.fraction
        batches = [next(self.stream) for _ in range(config.batch.accumulation)]
        factor = learning_rate_factor(
            self.progress.step,
            fraction,
            warmup_steps=schedule.warmup_steps,
            decay_ratio=schedule.decay_ratio,
            decay=schedule.decay,
        )
        weights = self.loss_weights.advance(fraction)
        order = config.loss.schedule
        result = train_step(self.model, self.optimizers, batches, self.compute, order, factor, weights)
        self.progress.step += 1
        self.progress.tokens += config.tokens_per_step
        return result

    def best_validation_loss(self) -> float:
        """The lowest validation loss of a checkpoint, in nats per token; infinity without one."""
        losses = [c.validation_loss for c in list_checkpoints(self.checkpoints)]
        return min((loss for loss in losses if loss is not None), default=math.inf)
