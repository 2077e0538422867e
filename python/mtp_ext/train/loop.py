"""The training loop: steps until a limit or a signal, with records, validations and checkpoints."""

from __future__ import annotations

import signal
import time
from contextlib import suppress
from functools import partial
from typing import Any

from mtp_ext.train.checkpoint.directory import CheckpointWriteError, list_checkpoints
from mtp_ext.train.evaluation.evaluate import Evaluation
from mtp_ext.train.interrupt import StopRequest
from mtp_ext.train.metrics import finite, memory_bytes, shown
from mtp_ext.train.progress import Ending
from mtp_ext.train.report.display import Display
from mtp_ext.train.report.record import MetricsWriter
from mtp_ext.train.step import NotFiniteError, StepResult
from mtp_ext.train.trainer import Trainer


class TrainingFailedError(RuntimeError):
    """The run cannot continue; the message says why, and from which checkpoint to resume."""


class Loop:
    """Runs a trainer.

    Args:
        trainer: The run, new or resumed.
        record: Receives its numbers.
        display: Shows its progress.
    """

    def __init__(self, trainer: Trainer, record: MetricsWriter, display: Display) -> None:
        self.trainer, self.record, self.display = trainer, record, display
        self._config, self._progress = trainer.config, trainer.progress
        self._start = time.perf_counter()
        self._seconds_before, self._fraction_before = self._progress.seconds, trainer.fraction
        self._step_seconds, self._step_tokens = 0.0, 0
        self._last_save, self._first_step = self._start, self._progress.step
        self._pending: dict[str, Any] | None = None  # the last step's record, until it is written

    def run(self) -> Ending:
        """Trains until a limit of the configuration or a signal; the last complete step gets a checkpoint.

        Raises:
            TrainingFailedError: The loss or the gradient is not finite, or anything else failed.
            KeyboardInterrupt: As raised, with the checkpoint to continue from in its message.
        """
        with StopRequest(announce=self.trainer.ranks.is_main) as stop:
            try:
                self._train(stop)
            except TrainingFailedError:
                raise
            except Exception as error:
                step, where = self._progress.step, self._rescue(error)
                raise TrainingFailedError(f"after step {step}: {reason(error)}. Training stopped; {where}") from error
            except BaseException as error:
                where = self._rescue(error) if stop.received is None else self._last_checkpoint()
                if isinstance(error, KeyboardInterrupt):
                    raise KeyboardInterrupt(where) from None
                raise
        speed = self._step_tokens / self._step_seconds if self._step_seconds else 0.0
        return Ending(stop.received, speed, memory_bytes(self.trainer.compute.device))

    def _train(self, stop: StopRequest) -> None:
        """Steps until a limit or a signal, then writes the last record and checkpoint."""
        trainer = self.trainer
        while not self._is_stopped(stop) and trainer.fraction < 1.0:
            self._step()
            loss = self._validate()
            if trainer.ranks.from_main(partial(self._checkpoint_is_due, loss)):
                trainer.save(loss)
                self._last_save = time.perf_counter()
            self._progress.seconds = self._seconds()
        self._write_record()
        trainer.save()

    def _is_stopped(self, stop: StopRequest) -> bool:
        """Returns True if any process received a signal, which then counts as received by all."""
        if number := self.trainer.ranks.maximum(stop.received or 0):
            stop.received = signal.Signals(number)
        return number > 0

    def _rescue(self, error: BaseException) -> str:
        """Writes a checkpoint of the last complete step if the state in memory allows it; returns where to continue."""
        trainer = self.trainer
        alone = trainer.ranks.size == 1  # a shard cannot be written where another process may be gone
        writable = alone and trainer.is_consistent and not isinstance(error, CheckpointWriteError)
        if writable and self._progress.step > self._first_step:
            with suppress(Exception):  # the first error is the one to report
                self._write_record()
            with suppress(Exception):  # a lost device, a full disk: the last checkpoint remains
                trainer.save()
        return self._last_checkpoint()

    def _last_checkpoint(self) -> str:
        """Names the last good checkpoint and how to continue from it."""
        good = list_checkpoints(self.trainer.checkpoints)
        if not good:
            return "there is no checkpoint yet"
        return f"the last good checkpoint is {good[-1].path}; continue with: mtp train --resume {good[-1].path}"

    def _seconds(self) -> float:
        """Seconds of training, including earlier parts of a resumed run; the main process's clock counts for all."""
        return self.trainer.ranks.from_main(lambda: self._seconds_before + time.perf_counter() - self._start)

    def _step(self) -> None:
        """Takes a step, records it if due, and shows it."""
        before, tokens_before = time.perf_counter(), self._progress.tokens
        try:
            result = self.trainer.step()
        except NotFiniteError as error:
            raise TrainingFailedError(self._explain(error)) from None
        self._step_seconds += time.perf_counter() - before
        self._step_tokens += self._progress.tokens - tokens_before
        self._progress.seconds = self._seconds()
        self._pending = self._values(result)
        step = self._progress.step
        if step == 1 or step % self._config.logging.every_steps == 0:
            self._write_record()
        self._show(result)

    def _explain(self, error: NotFiniteError) -> str:
        """Explains what to do about a loss that is not finite."""
        return (
            f"step {self._progress.step + 1}: {error}. Training stopped; {self._last_checkpoint()}. A lower learning "
            "rate (--optim.lr, --optim.muon-lr) or a longer warmup (--schedule.warmup-steps) usually helps"
        )

    def _values(self, result: StepResult) -> dict[str, Any]:
        """Returns the record of a step."""
        return {
            **self.trainer.position(),
            **result.heads.as_dict(),
            "head_weights": list(result.head_weights),
            "grad_norm": result.grad_norm,
            "lr": result.factor * self._config.optim.lr,
            "tokens_per_second": self._step_tokens / self._step_seconds,
            "memory_bytes": memory_bytes(self.trainer.compute.device),
        }

    def _write_record(self) -> None:
        """Writes the record of the last step, once."""
        if self._pending is not None:
            self.record.write("train", self._progress.step, self._pending)
        self._pending = None

    def _show(self, result: StepResult) -> None:
        """Shows the progress of the run and the last step's numbers."""
        progress, fraction = self._progress, self.trainer.fraction
        gained = fraction - self._fraction_before
        left = (1.0 - fraction) * (progress.seconds - self._seconds_before) / gained if gained > 0 else None
        weighted = zip(result.heads.head_loss, result.head_weights, strict=True)
        losses = " ".join(shown(loss if weight else None, ".2f") for loss, weight in weighted)
        speed = self._step_tokens / self._step_seconds
        status = f"step {progress.step}  loss per head {losses}  {speed:,.0f} tokens/s"
        self.display.update(fraction, left, status)

    def _validate(self) -> float | None:
        """Validates if due; returns head 1's loss in nats per token."""
        trainer, settings, step = self.trainer, self._config.evaluation, self._progress.step
        if not settings.every_steps or step % settings.every_steps or not trainer.has_validation:
            return None
        evaluation = trainer.evaluate(settings.batches)
        self.record.write("validation", step, {**trainer.position(), **evaluation.as_dict()})
        self.display.say(f"step {step}: {describe(evaluation)}")
        loss: float | None = finite(evaluation.heads.head_loss[0])
        return loss

    def _checkpoint_is_due(self, validation_loss: float | None) -> bool:
        """Returns True if a checkpoint is due by steps, seconds or a new best loss."""
        settings, step = self._config.checkpoint, self._progress.step
        if settings.every_steps and step % settings.every_steps == 0:
            return True
        if settings.every_seconds and time.perf_counter() - self._last_save >= settings.every_seconds:
            return True
        if not settings.keep_best or validation_loss is None:
            return False
        return validation_loss < self.trainer.best_validation_loss()


def reason(error: BaseException) -> str:
    """Formats an error in one line: the system's message and file, else its type and message."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    message = " ".join(str(error).split())
    if isinstance(error, CheckpointWriteError):
        return message
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def describe(evaluation: Evaluation) -> str:
    """Formats an evaluation in one line."""
    per_byte = " ".join(shown(x, ".3f") for x in evaluation.nats_per_byte)
    return f"validation {per_byte} nats/byte per head, accept length {shown(evaluation.heads.accept_length, '.2f')}"
