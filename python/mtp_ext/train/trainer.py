"""The state of a run, with its steps, saving and loading."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from mtp_ext.distributed.fully_shard import fully_shard_
from mtp_ext.distributed.ranks import Ranks
from mtp_ext.distributed.whole_state import shard_like, whole_state
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
from mtp_ext.train.checkpoint.saved_model import write_description
from mtp_ext.train.config import TrainConfig
from mtp_ext.train.data import Dataset, TrainingStream
from mtp_ext.train.device import Compute
from mtp_ext.train.evaluation.evaluate import Evaluation, evaluate
from mtp_ext.train.optim import Optimizers
from mtp_ext.train.progress import Progress, learning_rate_factor
from mtp_ext.train.step import StepResult, train_step


class Trainer:
    """The state of a run: model, optimisers, data order, random generators and progress.

    Args:
        config: The run's configuration.
        directory: The directory of its records and checkpoints.
        dataset: The tokenised corpus.
        model: The model, on its device.
        compute: Device and precision.
        ranks: The processes that train together, over which the model is then sharded; default this one alone.
    """

    def __init__(
        self,
        config: TrainConfig,
        directory: Path,
        dataset: Dataset,
        model: MTPModel,
        compute: Compute,
        ranks: Ranks | None = None,
    ) -> None:
        self.ranks = ranks or Ranks()
        self.config, self.dataset, self.model, self.compute = config, dataset, model, compute
        self.checkpoints = directory / CHECKPOINTS
        batch = config.batch
        self.stream = TrainingStream(
            dataset,
            "train",
            batch.seq_len,
            model.config.n_future,
            batch.batch_size,
            config.seed,
            rank=self.ranks.rank,
            world_size=self.ranks.size,
        )
        if self.ranks.size > 1:
            from torch.distributed.device_mesh import init_device_mesh

            fully_shard_(model, init_device_mesh(compute.device.type, (self.ranks.size,)))
        self.optimizers = Optimizers(model, config.optim)
        self.progress = Progress()
        self._steps_before = 0  # of earlier parts of the run
        self._boundary: dict[str, Any] | None = None  # state before the current step; None between steps
        self.loss_weights = config.loss.weights(model.config.n_future)
        model.heads.recompute = config.loss.recompute
        self.has_validation = "validation" in dataset.splits

    def load(self, checkpoint: Checkpoint) -> None:
        """Restores the whole state from a checkpoint.

        Raises:
            ValueError: It was trained on another corpus or tokenizer.
        """
        state = load_training_state(checkpoint)
        self.stream.load_state_dict(state["stream"])
        own = self.model.state_dict()
        # An unexpected name has nothing to be like; `load_state_dict` names it.
        whole = load_model_state(checkpoint)
        self.model.load_state_dict({name: shard_like(value, own.get(name)) for name, value in whole.items()})
        self.optimizers.load_state_dict(state["optimizers"])
        self.progress = Progress(**state["progress"])
        self._steps_before = self.progress.step - self.optimizers.updates
        if "loss_weights" in state:  # absent in old checkpoints
            self.loss_weights.load_state_dict(state["loss_weights"])
        torch.set_rng_state(state["rng"]["cpu"])
        if self.compute.device.type == "cuda" and state["rng"]["cuda"] is not None:
            torch.cuda.set_rng_state(state["rng"]["cuda"], self.compute.device)

    def save(self, validation_loss: float | None = None) -> None:
        """Writes a checkpoint of the last complete step and deletes those that are no longer kept.

        All processes call it together, and the main one writes. What it writes does not depend on their number.

        Raises:
            CheckpointWriteError: It cannot be written; earlier checkpoints are kept.
        """
        state = {
            "optimizers": self.optimizers.state_dict(),
            "progress": self.progress.state_dict(),
            **(self._boundary or self._order_state()),
        }
        model = whole_state(self.model.state_dict())
        if not self.ranks.is_main:
            return
        write_checkpoint(
            self.checkpoints,
            self.progress.step,
            model,
            state,
            validation_loss=validation_loss,
            write_extra=lambda path: write_description(path, self.config, self.model.config, self.dataset),
        )
        settings = self.config.checkpoint
        prune_checkpoints(self.checkpoints, settings.keep_last, keep_best=settings.keep_best)

    @property
    def is_consistent(self) -> bool:
        """True unless a step was interrupted during its update; only then `save` must not be called."""
        return self._steps_before + self.optimizers.updates == self.progress.step

    def _order_state(self) -> dict[str, Any]:
        """Returns the state that a step changes before its update: data order, loss weights and random generators."""
        on_gpu = self.compute.device.type == "cuda"
        return {
            "stream": self.stream.state_dict(),
            "loss_weights": self.loss_weights.state_dict(),
            "rng": {
                "cpu": torch.get_rng_state(),
                "cuda": torch.cuda.get_rng_state(self.compute.device) if on_gpu else None,
            },
        }

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

    def describe_devices(self) -> str:
        """Describes the device and precision of a process, and how many there are, for display."""
        several = f", in each of {self.ranks.size} processes" if self.ranks.size > 1 else ""
        return f"{self.compute.describe()}{several}"

    def whole_model(self) -> MTPModel:
        """Returns the model in one piece; all processes call it together, and hold it as a whole."""
        if self.ranks.size == 1:
            return self.model
        state = whole_state(self.model.state_dict())
        model = MTPModel(self.model.config).to(self.compute.device)
        model.load_state_dict(state)
        return model

    def position(self) -> dict[str, float]:
        """Returns tokens, epochs of the training split and seconds of training, for the record."""
        return {"tokens": self.progress.tokens, "epochs": self.stream.epochs, "seconds": self.progress.seconds}

    @property
    def fraction(self) -> float:
        """The fraction of the run that is done."""
        return self.progress.fraction(self.config.limits)

    def step(self) -> StepResult:
        """Takes the next step.

        Raises:
            NotFiniteError: The loss or the gradient is not finite; the model has not been updated.
        """
        self.model.train()
        self._boundary = self._order_state()
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
        result = train_step(self.model, self.optimizers, batches, self.compute, order, factor, weights, self.ranks)
        self.progress.tokens += int(self.ranks.sum(torch.tensor(sum(batch.n_tokens for batch in batches))))
        self._boundary = None
        self.progress.step += 1  # last: `is_consistent` compares it with the updates
        return result

    def best_validation_loss(self) -> float:
        """Returns the lowest validation loss of any checkpoint, in nats per token; infinity without one."""
        losses = [c.validation_loss for c in list_checkpoints(self.checkpoints)]
        return min((loss for loss in losses if loss is not None), default=math.inf)
