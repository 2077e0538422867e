"""The configuration of a training run: dataclasses that define the command line, the TOML file and the run's record.

A field that may be ``None`` has ``None`` as its default, so that a TOML file (which has no null) records a run exactly.
Fields marked ``FREE`` may change when a run is resumed; all others must stay the same.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from mtp_ext.nn import MTPConfig
from mtp_ext.nn.variants import VARIANTS
from mtp_ext.train.data import DataConfig
from mtp_ext.train.data.config import FREE
from mtp_ext.train.loss_weights import LossWeights, parse_point
from mtp_ext.train.progress import Limits

DEFAULT_MAX_SECONDS = 300.0
DEFAULT_D_MODEL = 192
DEFAULT_TRUNK_LAYERS = 2
DEFAULT_HEAD_DIM = 64

if TYPE_CHECKING:
    Variant = str
else:
    Variant = Literal[tuple(VARIANTS)]


def check_at_least(minimum: float, prefix: str, config: object, *names: str) -> None:
    """Raises ValueError if a field of a section is below ``minimum`` or NaN; ``None`` passes."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not value >= minimum:
            raise ValueError(f"{prefix}{name} must be at least {minimum:g}, got {value!r}")


def check_fraction(prefix: str, config: object, *names: str) -> None:
    """Raises ValueError if a field of a section is outside ``[0, 1]``."""
    for name in names:
        value = getattr(config, name)
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"{prefix}{name} must be in [0, 1], got {value!r}")


@dataclass(frozen=True)
class ModelConfig:
    """The model: a preset of the paper or a custom shape; explicit sizes override the preset's."""

    preset: str | None = None
    """A shape from the paper's appendix M: 1M, 3M, 10M, ..., 13B."""
    n_future: int = 4
    """Number of predicted tokens n: head k predicts the k-th token ahead."""
    variant: Variant = "parallel"
    """Architecture of the heads: the paper's five (appendix B), DeepSeek-V3's modules, or n targets on one row of
    logits."""
    d_model: int | None = None
    """Model width (default: the preset's, else the default run's)."""
    n_layers: int | None = None
    """Total transformer layers of trunk and heads (default: the preset's, else the default run's)."""
    n_attn_heads: int | None = None
    """Attention heads per layer (default: the preset's, else the default run's)."""
    n_kv_heads: int | None = None
    """Key-value heads of grouped-query attention (default: n_attn_heads)."""
    d_ff: int | None = None
    """Inner width of the SwiGLU (default: 8/3 of d_model, rounded up to a multiple of 64)."""
    max_seq_len: int | None = None
    """Maximum sequence length in tokens (default: four training sequences)."""
    tie_embeddings: bool = False
    """Tie the unembedding to the embedding."""
    replicate_unembedding: bool = False
    """One unembedding per head, as the replicated variant always has."""
    dropout: float = 0.0
    """Dropout probability of what each layer adds to the residual stream."""
    shared_final_norm: bool = False
    """One final RMSNorm for all heads instead of one each."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies."""
    norm_eps: float = 1e-5
    """Added to the mean square in RMSNorm."""

    def __post_init__(self) -> None:
        sizes = ("n_future", "d_model", "n_layers", "n_attn_heads", "n_kv_heads", "d_ff", "max_seq_len")
        check_at_least(1, "model.", self, *sizes)

    def longest(self, seq_len: int) -> int:
        """Returns the model's maximum sequence length for a training sequence length (tokens)."""
        return max(seq_len, self.max_seq_len or 4 * seq_len)

    def build(self, vocab_size: int, seq_len: int) -> MTPConfig:
        """Builds the model's configuration for a vocabulary and a training sequence length (tokens).

        Raises:
            TypeError, ValueError: As for `MTPConfig`.
        """
        given = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        given["max_seq_len"] = self.longest(seq_len)
        preset = given.pop("preset", None)
        if preset is not None:
            return MTPConfig.preset(preset, vocab_size=vocab_size, **given)
        d_model = self.d_model or DEFAULT_D_MODEL
        heads = VARIANTS[self.variant].n_layers(self.n_future)
        shape = {
            "d_model": d_model,
            "n_layers": DEFAULT_TRUNK_LAYERS + heads,
            "n_attn_heads": max(1, d_model // DEFAULT_HEAD_DIM),
        }
        return MTPConfig(vocab_size=vocab_size, **(shape | given))


@dataclass(frozen=True)
class BatchConfig:
    """The batch of one optimiser step: batch_size * accumulation sequences."""

    seq_len: int = 256
    """Tokens per packed sequence."""
    batch_size: int = 4
    """Sequences per forward pass."""
    accumulation: int = 1
    """Forward passes per step, whose gradients are accumulated as in one large batch."""

    def __post_init__(self) -> None:
        check_at_least(1, "batch.", self, "seq_len", "batch_size", "accumulation")


@dataclass(frozen=True)
class LossConfig:
    """The objective: the sum of the heads' losses, and the order in which they are computed."""

    schedule: Literal["sequential", "joint", "autograd"] = "sequential"
    """sequential: head by head, least memory; joint: all heads in one pass; autograd: plain torch, the reference."""
    head_weights: tuple[float, ...] | None = None
    """Weight of each head's loss (default: 1 each, the paper's sum). Heads of weight 0 cost nothing."""
    discount: float = 1.0
    """Geometric discount: head k's weight is multiplied by discount^(k-1)."""
    weight_points: tuple[str, ...] | None = None
    """Factors of the heads' weights over the run, interpolated linearly: fraction:weight,weight,... such as
    0:1,0,0,0 0.5:1,1,1,1."""
    curriculum: Literal["none", "forward", "reverse"] = "none"
    """forward: head 1 first, one more after each 1/n of the run; reverse: all heads first, one fewer after each."""
    recompute: bool = False
    """Rerun chained heads (causal, anticausal) in backward instead of keeping their activations."""

    def weights(self, n_future: int) -> LossWeights:
        """Builds the weights over the run.

        Raises:
            ValueError: They conflict, or do not match the number of heads.
        """
        try:
            return LossWeights(
                n_future,
                head_weights=self.head_weights,
                discount=self.discount,
                points=[parse_point(text) for text in self.weight_points or ()],
                curriculum=self.curriculum,
            )
        except ValueError as error:
            raise ValueError(f"loss.{error}") from None


@dataclass(frozen=True)
class OptimConfig:
    """The optimiser: AdamW, or Muon for the layers' matrices with AdamW for the rest."""

    name: Literal["adamw", "muon"] = "muon"
    """muon needs fewer steps; it keeps AdamW for embedding, unembedding and norms."""
    lr: float = field(default=3e-3, metadata=FREE)
    """Peak learning rate of AdamW."""
    muon_lr: float = field(default=0.02, metadata=FREE)
    """Peak learning rate of Muon."""
    beta1: float = field(default=0.9, metadata=FREE)
    """Decay of AdamW's first moment."""
    beta2: float = field(default=0.95, metadata=FREE)
    """Decay of AdamW's second moment."""
    momentum: float = field(default=0.95, metadata=FREE)
    """Decay of Muon's momentum."""
    weight_decay: float = field(default=0.1, metadata=FREE)
    """Decoupled weight decay of matrices; norms have none."""
    clip_norm: float = field(default=1.0, metadata=FREE)
    """Maximum norm of the whole gradient; 0 disables clipping."""

    def __post_init__(self) -> None:
        check_at_least(0, "optim.", self, "lr", "muon_lr", "weight_decay", "clip_norm")
        check_fraction("optim.", self, "beta1", "beta2", "momentum")


@dataclass(frozen=True)
class ScheduleConfig:
    """The learning rate over the run: linear warmup, then a decay that ends with the run."""

    warmup_steps: int = field(default=40, metadata=FREE)
    """Steps of linear warmup."""
    decay: Literal["cosine", "linear"] = field(default="cosine", metadata=FREE)
    """Shape of the decay."""
    decay_ratio: float = field(default=0.03, metadata=FREE)
    """Final learning rate as a fraction of the peak."""

    def __post_init__(self) -> None:
        check_at_least(0, "schedule.", self, "warmup_steps")
        check_fraction("schedule.", self, "decay_ratio")


@dataclass(frozen=True)
class EvaluationConfig:
    """Validation on the held-out split."""

    every_steps: int = field(default=200, metadata=FREE)
    """Steps between validations; 0 validates at the end only."""
    batches: int = field(default=8, metadata=FREE)
    """Batches per validation during the run, spread over the split; 0 takes all."""
    final_batches: int = field(default=0, metadata=FREE)
    """Batches of the final validation; 0 takes all."""
    batch_size: int = field(default=8, metadata=FREE)
    """Sequences per validation batch."""

    def __post_init__(self) -> None:
        check_at_least(0, "evaluation.", self, "every_steps", "batches", "final_batches")
        check_at_least(1, "evaluation.", self, "batch_size")


@dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written and which are kept; the last step always gets one."""

    every_seconds: float = field(default=60.0, metadata=FREE)
    """Seconds between checkpoints; 0 uses every_steps only."""
    every_steps: int = field(default=0, metadata=FREE)
    """Steps between checkpoints; 0 uses every_seconds only."""
    keep_last: int = field(default=2, metadata=FREE)
    """Number of latest checkpoints to keep."""
    keep_best: bool = field(default=False, metadata=FREE)
    """Also write and keep the checkpoint with the lowest validation loss of head 1."""

    def __post_init__(self) -> None:
        check_at_least(0, "checkpoint.", self, "every_seconds", "every_steps")
        check_at_least(1, "checkpoint.", self, "keep_last")


@dataclass(frozen=True)
class LoggingConfig:
    """What a run records and shows."""

    every_steps: int = field(default=10, metadata=FREE)
    """Steps between records; each record holds one step's numbers."""
    tensorboard: bool = field(default=True, metadata=FREE)
    """Write TensorBoard event files."""
    plots: bool = field(default=True, metadata=FREE)
    """Plot the losses and the accept length as PNGs at the end."""
    sample_tokens: int = field(default=96, metadata=FREE)
    """Tokens of the sample generated at the end; 0 generates none, and does not compare decoding with and without
    drafts."""

    def __post_init__(self) -> None:
        check_at_least(1, "logging.", self, "every_steps")
        check_at_least(0, "logging.", self, "sample_tokens")


@dataclass(frozen=True)
class TrainConfig:
    """A training run. It ends at the first limit that it reaches; the default is 300 seconds."""

    out: Path | None = field(default=None, metadata=FREE)
    """Directory of the run (default: a new one under runs/, named by the time)."""
    max_steps: int | None = field(default=None, metadata=FREE)
    """Maximum number of optimiser steps."""
    max_seconds: float | None = field(default=None, metadata=FREE)
    """Maximum seconds of training, without the final validation, sample and plots."""
    max_tokens: int | None = field(default=None, metadata=FREE)
    """Maximum number of tokens to train on."""
    seed: int = 0
    """Seed of the model's initial weights and of the data's order."""
    device: str = field(default="auto", metadata=FREE)
    """cpu, cuda, cuda:1, ..., or auto: a GPU if there is one."""
    precision: Literal["auto", "float32", "bfloat16"] = field(default="auto", metadata=FREE)
    """bfloat16 uses autocast; auto does so on GPUs and on CPUs with bfloat16 instructions."""
    threads: int | None = field(default=None, metadata=FREE)
    """CPU threads (default: torch's choice)."""
    cache: Path | None = field(default=None, metadata=FREE)
    """Directory of tokenised corpora (default: the user's cache directory)."""
    init_from: Path | None = None
    """Start from the weights of a checkpoint, of a run or of a Hugging Face model's directory (Llama, Mistral), instead
    of random ones; optimiser, data order and steps start anew. The options of the model must match."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    def __post_init__(self) -> None:
        check_at_least(1, "", self, "max_steps", "max_tokens", "threads")
        check_at_least(0, "", self, "seed")
        if self.max_seconds is not None and not self.max_seconds > 0:
            raise ValueError(f"max_seconds must be greater than 0, got {self.max_seconds!r}")
        self.loss.weights(self.model.n_future)

    @property
    def limits(self) -> Limits:
        """The limits of the run."""
        return Limits(self.max_steps, self.max_seconds, self.max_tokens)
