"""Ordinary decoding: one token per step, from head 1, with a key-value cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mtp_ext.generate.sampling import Sampling
from mtp_ext.generate.stats import DecodingStats
from mtp_ext.nn import KVCache, MTPModel
from mtp_ext.ops.common.checks import INDEX_DTYPES, check_tensor, describe


@dataclass(frozen=True)
class GenerationOutput:
    """The result of :func:`generate`.

    Attributes:
        tokens: The new tokens of each row, ``[<= max_new_tokens]`` int64, without the prompt, including a final
            ``eos_token``.
        stats: Counts of forwards and tokens.
    """

    tokens: list[Tensor]
    stats: DecodingStats


@torch.no_grad()
def generate(
    model: MTPModel,
    prompt: Tensor | Sequence[Tensor],
    max_new_tokens: int,
    *,
    n_draft: int | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_token: int | None = None,
    generator: torch.Generator | None = None,
    on_tokens: Callable[[int, list[int]], None] | None = None,
) -> GenerationOutput:
    """Continues each prompt by up to ``max_new_tokens`` tokens.

    Args:
        model: The model.
        prompt: ``[B, P]`` int64 or int32, or ``B`` 1-d tensors of length at least 1.
        max_new_tokens: Maximum number of tokens to add to each row.
        n_draft: Drafts per step; only ordinary decoding is implemented: 0 or None.
        temperature: 0 takes the most likely token; otherwise logits are divided by it and a token is sampled.
        top_k: Sample from the ``k`` most likely tokens.
        top_p: Sample from the smallest set of most likely tokens whose probabilities sum to at least ``p``.
        eos_token: Ends a row.
        generator: Random generator on the model's device; default torch's global one.
        on_tokens: Called with a row's index and its new tokens as soon as they are known.
    Returns:
        :class:`GenerationOutput`.
    Raises:
        TypeError, ValueError: A wrong argument, or a prompt that leaves no room for the new tokens in ``max_seq_len``.
        NotImplementedError: ``n_draft > 0``.
    """
    prompts = _checked_prompts(model, prompt)
    _check_counts(model, prompts, max_new_tokens, n_draft)
    rows = _Rows(len(prompts), max_new_tokens, eos_token, on_tokens)
    if max_new_tokens > 0:
        _decode(model, prompts, rows, Sampling(temperature, top_k, top_p), generator)
    tokens = [torch.tensor(new, dtype=torch.int64, device=prompts[0].device) for new in rows.tokens]
    n_tokens = sum(len(new) for new in rows.tokens)
    return GenerationOutput(tokens, DecodingStats(rows.n_forward, n_tokens, n_drafted=0, histogram=(n_tokens,)))


def _decode(
    model: MTPModel, prompts: list[Tensor], rows: _Rows, sampling: Sampling, generator: torch.Generator | None
) -> None:
    """Fills ``rows``; finished rows continue as padding until the last one ends."""
    lengths = [len(p) for p in prompts]
    cache = KVCache(len(prompts), max(lengths) + rows.max_new_tokens)
    hidden = model.next_token_hidden(torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True), cache, lengths)
    while rows.add(tokens := _draw(model, hidden, sampling, generator)):
        hidden = model.next_token_hidden(tokens[:, None], cache, [1] * len(prompts))


def _draw(model: MTPModel, hidden: Tensor, sampling: Sampling, generator: torch.Generator | None) -> Tensor:
    """Draws one token per row of head 1's normed output ``[B, D]``: ``[B]`` int64."""
    if sampling.n_best is None:
        return sampling.draw(model.heads.logits(1, hidden), generator)
    vocab_size = model.config.vocab_size
    logits, classes = model.heads.best_classes(1, hidden, min(sampling.n_best, vocab_size))
    return sampling.draw_from_best(logits, classes, vocab_size, generator)


class _Rows:
    """The new tokens of each row, and the rows that are still running."""

    def __init__(
        self,
        n_rows: int,
        max_new_tokens: int,
        eos_token: int | None,
        on_tokens: Callable[[int, list[int]], None] | None,
    ) -> None:
        self.max_new_tokens, self.eos_token, self.on_tokens = max_new_tokens, eos_token, on_tokens
        self.tokens: list[list[int]] = [[] for _ in range(n_rows)]
        self.running = set(range(n_rows))
        self.n_forward = 0

    def add(self, tokens: Tensor) -> bool:
        """Adds one forward's tokens ``[B]``; returns True if another forward is needed."""
        self.n_forward += 1
        for row, token in enumerate(tokens.tolist()):
            if row not in self.running:
                continue
            self.tokens[row].append(token)
            if self.on_tokens is not None:
                self.on_tokens(row, [token])
            if token == self.eos_token or len(self.tokens[row]) == self.max_new_tokens:
                self.running.remove(row)
        return bool(self.running)


def _checked_prompts(model: MTPModel, prompt: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """Checks the prompts and returns them as 1-d int64 tensors on the model's device."""
    if isinstance(prompt, Tensor) and prompt.dim() != 2:
        raise ValueError(f"prompt must be [B, P] or a list of 1-d tensors, got {describe(prompt)}")
    prompts = list(prompt)
    if not prompts:
        raise ValueError("prompt must hold at least one row, got none")
    for i, row in enumerate(prompts):
        check_tensor(f"prompt[{i}]", row, dtypes=INDEX_DTYPES, shape="[P]")
        if row.dim() != 1 or len(row) == 0:
            raise ValueError(f"prompt[{i}] must be 1-d with at least one token, got {describe(row)}")
    device = model.embed.weight.device
    return [row.to(device, torch.int64) for row in prompts]


def _check_counts(model: MTPModel, prompts: list[Tensor], max_new_tokens: int, n_draft: int | None) -> None:
    for name, count in (("max_new_tokens", max_new_tokens), ("n_draft", n_draft)):
        if count is None and name == "n_draft":
            continue
        if isinstance(count, bool) or not isinstance(count, int):
            raise TypeError(f"{name} must be an int, got {count!r}")
        if count < 0:
            raise ValueError(f"{name} must not be negative, got {count}")
    if n_draft:
        raise NotImplementedError(
            f"n_draft must be 0 or None, got {n_draft}: speculative decoding is not implemented yet"
        )
    longest, limit = max(len(p) for p in prompts), model.config.max_seq_len
    if longest + max_new_tokens > limit:
        raise ValueError(
            f"max_new_tokens must leave prompt and new tokens within max_seq_len={limit}, got a prompt of {longest} "
            f"tokens and max_new_tokens={max_new_tokens}"
        )
