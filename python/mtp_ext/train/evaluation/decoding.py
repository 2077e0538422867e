"""Measures how a model decodes held-out text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from mtp_ext.generate.measure import DecodingMeasurement, measure_decoding
from mtp_ext.nn import MTPModel
from mtp_ext.train.config import check_at_least
from mtp_ext.train.data import Dataset, TokenSplit
from mtp_ext.train.data.dataset import VALIDATION

NDraft = int | Literal["auto"] | None
PROMPT_TOKENS, NEW_TOKENS = 128, 64
COMPARED_PROMPTS, COMPARISON_SECONDS = 6, 3.0


@dataclass(frozen=True)
class DecodeConfig:
    """Continuations of held-out text that are decoded, to measure drafts."""

    prompts: int = 32
    """Number of prompts, spread evenly over the split; 0 decodes nothing."""
    prompt_tokens: int | None = None
    """Tokens of a prompt (default: 128, or half a training sequence)."""
    new_tokens: int | None = None
    """Maximum number of tokens to add to a prompt, which the end of a document cuts (default: 64, or what is left)."""
    n_draft: NDraft = None
    """Drafts per round, or auto: where they pay (default: every head drafts)."""
    batch_size: int = 8
    """Prompts that are decoded together."""
    temperature: float = 0.0
    """0 always takes the most likely token; otherwise tokens are sampled."""
    top_k: int | None = None
    """Sample from the k most likely tokens only."""
    top_p: float | None = None
    """Sample from the smallest set of most likely tokens whose probabilities sum to at least p."""
    seed: int = 0
    """Seed of the sampling."""

    def __post_init__(self) -> None:
        check_at_least(0, "decode.", self, "prompts")
        check_at_least(1, "decode.", self, "prompt_tokens", "new_tokens", "batch_size")

    def fitted(self, seq_len: int) -> DecodeConfig:
        """Returns the configuration with both lengths, which fit a sequence length (tokens) unless they were given."""
        prompt = self.prompt_tokens or min(PROMPT_TOKENS, max(1, seq_len // 2))
        new = self.new_tokens or max(1, min(NEW_TOKENS, seq_len - prompt))
        return replace(self, prompt_tokens=prompt, new_tokens=new)


def measure_on_split(
    model: MTPModel,
    dataset: Dataset,
    split: str,
    config: DecodeConfig,
    n_drafts: Sequence[NDraft] | None = None,
    seconds: float = float("inf"),
) -> list[DecodingMeasurement]:
    """Decodes continuations of a split with each number of drafts in turn, as `measure_decoding` does.

    Args:
        model: The model.
        dataset: The tokenised corpus.
        split: ``"train"`` or ``"validation"``.
        config: What to decode.
        n_drafts: Numbers of drafts; default that of ``config``.
        seconds: Begins no further batch after this time.
    Raises:
        ValueError: The split has no text, or prompt and new tokens exceed the model's longest sequence.
    """
    config = config.fitted(model.config.max_seq_len)
    assert config.prompt_tokens is not None and config.new_tokens is not None
    prompts = choose_prompts(dataset.split(split), config.prompts, config.prompt_tokens, config.new_tokens)
    device = next(model.parameters()).device
    return measure_decoding(
        model,
        [prompt.to(device) for prompt in prompts],
        config.new_tokens,
        [config.n_draft] if n_drafts is None else n_drafts,
        batch_size=config.batch_size,
        seconds=seconds,
        seed=config.seed,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        eos_token=dataset.tokenizer.separator_id,
    )


def compare_with_drafts(model: MTPModel, dataset: Dataset, seq_len: int) -> list[DecodingMeasurement]:
    """Decodes a few held-out prompts without and with drafts, one after the other, in a few seconds.

    Args:
        model: The model.
        dataset: The tokenised corpus.
        seq_len: Tokens of a training sequence.
    Returns:
        Two measurements; none where there are no drafts, no held-out text or no room for a round.
    """
    heads = model.heads
    if heads.n_heads < 2 or VALIDATION not in dataset.splits or seq_len < 3:
        return []
    config = DecodeConfig(prompts=COMPARED_PROMPTS, batch_size=1).fitted(seq_len)
    return measure_on_split(model, dataset, VALIDATION, config, [0, None], COMPARISON_SECONDS)


def choose_prompts(split: TokenSplit, count: int, prompt_tokens: int, new_tokens: int) -> list[Tensor]:
    """Chooses prompts from disjoint windows of ``prompt_tokens + new_tokens`` of the documents.

    A document shorter than a window gives one prompt, of at most its first half.

    Args:
        split: Where they come from.
        count: Maximum number of prompts; windows are taken at even distances.
        prompt_tokens: Maximum length of a prompt.
        new_tokens: Tokens that will be added to it.
    Returns:
        At most ``count`` tensors ``[<= prompt_tokens]`` int64, on the CPU.
    Raises:
        ValueError: All documents are empty.
    """
    starts, size = split.document_starts[:-1], prompt_tokens + new_tokens
    lengths = np.diff(split.document_starts) - 1  # without the separator
    prompt_lengths = np.where(lengths < size, np.minimum((lengths + 1) // 2, prompt_tokens), prompt_tokens)
    n_windows = np.where(lengths < size, lengths > 0, lengths // size)
    ends = n_windows.cumsum()
    if not ends[-1]:
        raise ValueError(f"the {split.name} split has no text to continue: its documents are empty")
    chosen = np.linspace(0, ends[-1], min(count, int(ends[-1])), endpoint=False, dtype=np.int64)
    documents = np.searchsorted(ends, chosen, side="right")
    firsts = starts[documents] + (chosen - (ends - n_windows)[documents]) * size
    prompts = zip(firsts.tolist(), prompt_lengths[documents].tolist(), strict=True)
    return [torch.from_numpy(split.read(first, first + length).astype(np.int64)) for first, length in prompts]
