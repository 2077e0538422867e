"""Evaluates a model: validation loss per head, in nats per token and nats per byte."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mtp_ext.nn import MTPModel
from mtp_ext.nn.evaluation_mode import evaluation_mode
from mtp_ext.ops import MultiTokenLoss
from mtp_ext.train.data import Dataset, evaluation_batches
from mtp_ext.train.device import Compute
from mtp_ext.train.metrics import HeadMetrics, HeadTotals


@dataclass(frozen=True)
class Evaluation:
    """A model's results on a split.

    Attributes:
        heads: Losses in nats per token, top-1 and accept length.
        bytes_per_token: Bytes of text per token of the split.
        n_tokens: Positions evaluated.
    """

    heads: HeadMetrics
    bytes_per_token: float
    n_tokens: int

    @property
    def nats_per_byte(self) -> list[float | None]:
        """Each head's loss in nats per byte, comparable between tokenizers."""
        return [None if loss is None else loss / self.bytes_per_token for loss in self.heads.head_loss]

    def as_dict(self) -> dict[str, Any]:
        """Returns the numbers as a record."""
        return {**self.heads.as_dict(), "nats_per_byte": self.nats_per_byte, "evaluated_tokens": self.n_tokens}


@torch.no_grad()
def evaluate(
    model: MTPModel,
    dataset: Dataset,
    compute: Compute,
    *,
    seq_len: int,
    batch_size: int,
    batches: int = 0,
    split: str = "validation",
    schedule: str = "sequential",
    head_weights: Sequence[float] | None = None,
) -> Evaluation:
    """Evaluates a model on a split, in its order, so that the numbers are reproducible.

    Args:
        model: The model; its training mode is restored.
        dataset: The tokenised corpus.
        compute: Device and precision.
        seq_len: Tokens per row.
        batch_size: Rows per batch.
        batches: Maximum number of batches, spread evenly over the split; 0 takes all.
        split: ``"train"`` or ``"validation"``.
        schedule: As in `MTPModel`.
        head_weights: Weight of each head in the objective.
    """
    totals, n_tokens = HeadTotals(head_weights), 0
    limit = batches * batch_size * seq_len or None
    with evaluation_mode(model):
        for batch in evaluation_batches(dataset, split, seq_len, model.config.n_future, batch_size, max_tokens=limit):
            tokens, labels, document_ids = (t.to(compute.device) for t in batch)
            with compute.autocast():
                result = model(tokens, labels=labels, document_ids=document_ids, schedule=schedule)
            assert isinstance(result, MultiTokenLoss)
            totals.add(result)
            n_tokens += batch.n_tokens
    return Evaluation(totals.metrics(), dataset.split(split).bytes_per_token, n_tokens)
