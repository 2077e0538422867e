"""Decoding by head 1, with drafts from the other heads, and a key-value cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypedDict

import torch
from torch import Tensor

from mtp_ext.generate.acceptance import Drafts, emitted
from mtp_ext.generate.auto_draft import AutoDraft, seconds_per_round
from mtp_ext.generate.round import Round
from mtp_ext.generate.rows import OnTokens, Rows
from mtp_ext.generate.sampling import Sampling
from mtp_ext.generate.stats import DecodingStats
from mtp_ext.generate.stopwatch import Stopwatch
from mtp_ext.generate.tree_decoding import TreeRound, checked_tree, decode_with_tree
from mtp_ext.nn.multi_token_model import MultiTokenModel
from mtp_ext.nn.transformer.kv_cache import KVCache
from mtp_ext.ops.common.checks import INDEX_DTYPES, check_int, check_tensor, checked_items, describe
from mtp_ext.ops.few_rows import weights_read_once

DRAFTS = ("greedy", "sample")


class SamplingKeywords(TypedDict, total=False):
    """Arguments of :func:`generate` that choose tokens and end rows."""

    draft: str
    temperature: float
    top_k: int | None
    top_p: float | None
    eos_token: int | None


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
@weights_read_once()
def generate(
    model: MultiTokenModel,
    prompt: Tensor | Sequence[Tensor],
    max_new_tokens: int,
    *,
    n_draft: int | str | None = None,
    draft: str = "greedy",
    tree: Sequence[int] | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_token: int | None = None,
    generator: torch.Generator | None = None,
    on_tokens: OnTokens | None = None,
) -> GenerationOutput:
    """Continues each prompt by up to ``max_new_tokens`` tokens.

    Drafting changes how many tokens a forward gives, not which: greedy decoding gives the tokens of ordinary greedy
    decoding (except for ties within rounding, because several tokens are read at once), and sampled tokens have the
    distribution of ordinary sampling.

    Args:
        model: The model; a :class:`mtp_ext.nn.ComposedModel` if its trunk has a method ``context(tokens, document_ids,
            cache)``. Its heads must keep what they know of earlier tokens in that cache, or work token by token.
        prompt: ``[B, P]`` int64 or int32, or ``B`` 1-d tensors of length at least 1.
        max_new_tokens: Maximum number of tokens to add to each row.
        n_draft: Tokens that heads 2 to ``n_draft + 1`` draft in each round, for head 1 to verify in the next; 0 is
            ordinary decoding. Default: all of these heads. "auto": at most so many, and fewer or none where that
            gives more tokens a second, by the time of a round, which is measured once for a model and batch size, and
            by what is accepted; which is said by ``stats.n_draft`` and a log record of level INFO.
        draft: How drafts are proposed at a ``temperature`` above 0: "greedy", each head's most likely token, accepted
            with its probability, or "sample", drawn from the head's distribution.
        tree: Numbers of drafts by position, such as ``(3, 2, 1)``: the 3 most likely tokens of head 2, after each of
            them the 2 of head 3, and so on; at most 64 tokens are read in a round. More of them are accepted, and a
            round takes longer. Default: one at each position.
        temperature: 0 takes the most likely token; otherwise logits are divided by it and a token is sampled.
        top_k: Sample from the ``k`` most likely tokens.
        top_p: Sample from the smallest set of most likely tokens whose probabilities sum to at least ``p``.
        eos_token: Ends a row.
        generator: Random generator on the model's device; default torch's global one.
        on_tokens: Called with a row's index and the tokens that a round adds to it.
    Returns:
        :class:`GenerationOutput`.
    Raises:
        TypeError, ValueError: A wrong argument, or a prompt that leaves no room for the new tokens in ``max_seq_len``.
    """
    model.check_decoding()
    prompts = _checked_prompts(model, prompt)
    _check_room(model, prompts, max_new_tokens)
    if draft not in DRAFTS:
        raise ValueError(f"draft must be one of {', '.join(DRAFTS)}, got {draft!r}")
    of_tree = checked_tree(model, tree, n_draft, draft)
    most = _checked_n_draft(model, n_draft) if of_tree is None else len(of_tree.branches)
    sampling = Sampling(temperature, top_k, top_p)
    _check_ends(model, eos_token, generator, on_tokens)
    rows = Rows(len(prompts), most, max_new_tokens, eos_token, on_tokens)
    watch, device = Stopwatch(), prompts[0].device
    if max_new_tokens > 0:
        draws_drafts = draft == "sample" and temperature > 0
        if of_tree is None:
            round_ = Round(model, sampling, most, draws_drafts, generator, watch)
            most = _decode(round_, prompts, rows, chooses=n_draft == "auto")
        else:
            decode_with_tree(TreeRound(model, sampling, most, False, generator, watch, tree=of_tree), prompts, rows)
    stats = replace(rows.stats, n_draft=most, seconds=watch.seconds if device.type == "cpu" else {})
    return GenerationOutput([torch.tensor(row.tokens, dtype=torch.int64, device=device) for row in rows.rows], stats)


def _decode(round_: Round, prompts: list[Tensor], rows: Rows, *, chooses: bool) -> int:
    """Fills ``rows``; rows that have ended continue as padding until the last one ends.

    Returns the drafts per round, which it ``chooses`` or are those of ``round_``.
    """
    auto = None
    decided = [len(prompt) for prompt in prompts]  # tokens of each row that a forward reads besides drafts
    cache = KVCache(len(prompts), max(decided) + rows.max_new_tokens - 1)  # the last token is never read
    tokens = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True)
    first, drafts = torch.tensor(decided, device=tokens.device) - 1, Drafts(tokens[:, :0])
    while True:
        verdict, following = round_.run(tokens, first, drafts, cache)
        new = emitted(drafts.tokens, verdict)
        if auto is not None:
            auto.add([len(new[i]) - 1 for i in rows.running], drafts.tokens.shape[1])
        rows.add(new, drafts.tokens.shape[1])
        if first_forward := cache.max_length == 0:
            round_.watch.lap_of_all("prompt")
        if not rows.running:
            round_.watch.lap("host")
            return round_.n_draft
        cache.advance([n + len(row) - 1 for n, row in zip(decided, new, strict=True)])
        cache.follow(rows.running)
        drafts = following.first(cache.capacity - cache.max_length - 1)
        tokens = torch.cat([verdict.token[:, None], drafts.tokens], dim=1)
        if first_forward and chooses and drafts.tokens.shape[1] == round_.n_draft:
            auto = AutoDraft(seconds_per_round(round_, tokens, drafts, cache))
            round_.watch.lap("auto")
        if auto is not None and auto.n_draft < round_.n_draft:
            round_ = replace(round_, n_draft=auto.n_draft)
            drafts, tokens = drafts.first(auto.n_draft), tokens[:, : auto.n_draft + 1]
        decided, first = [1] * len(prompts), torch.zeros_like(first)


def _checked_prompts(model: MultiTokenModel, prompt: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """Checks the prompts and returns them as 1-d int64 tensors on the model's device."""
    if isinstance(prompt, Tensor) and prompt.dim() != 2:
        raise ValueError(f"prompt must be [B, P] or a list of 1-d tensors, got {describe(prompt)}")
    prompts = checked_items("prompt", prompt, "a tensor [B, P] or B 1-d tensors")
    if not prompts:
        raise ValueError("prompt must hold at least one row, got none")
    for i, row in enumerate(prompts):
        check_tensor(f"prompt[{i}]", row, dtypes=INDEX_DTYPES, shape="[P]")
        if row.dim() != 1 or len(row) == 0:
            raise ValueError(f"prompt[{i}] must be 1-d with at least one token, got {describe(row)}")
        if row.is_meta:
            raise ValueError(f"prompt[{i}] must have values, got {describe(row)}")
    device = next(model.parameters()).device
    return [row.to(device, torch.int64) for row in prompts]


def _check_room(model: MultiTokenModel, prompts: list[Tensor], max_new_tokens: int) -> None:
    _check_count("max_new_tokens", max_new_tokens)
    longest, limit = max(len(p) for p in prompts), model.max_seq_len
    if limit is not None and longest + max_new_tokens > limit:
        raise ValueError(
            f"max_new_tokens must leave prompt and new tokens within max_seq_len={limit}, got a prompt of {longest} "
            f"tokens and max_new_tokens={max_new_tokens}"
        )


def _checked_n_draft(model: MultiTokenModel, n_draft: int | str | None) -> int:
    """Returns the number of drafts, the most there can be if it is not given."""
    n_heads = model.heads.n_heads
    if n_draft is None or (isinstance(n_draft, str) and n_draft == "auto"):
        return n_heads - 1
    if isinstance(n_draft, str):
        raise ValueError(f"n_draft must be a number or 'auto', got {n_draft!r}")
    _check_count("n_draft", n_draft)
    if n_draft > n_heads - 1:
        raise ValueError(
            f"n_draft must be at most {n_heads - 1} with {n_heads} heads (heads 2 to n draft), got {n_draft}"
        )
    return n_draft


def _check_ends(model: MultiTokenModel, eos_token: object, generator: object, on_tokens: object) -> None:
    """Checks the arguments that are read only after the first forward."""
    if eos_token is not None:
        check_int("eos_token", eos_token, " or None")
        if not 0 <= int(eos_token) < model.heads.vocab_size:  # type: ignore[call-overload]
            raise ValueError(f"eos_token must be in [0, {model.heads.vocab_size}), got {eos_token}")
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator or None, got {describe(generator)}")
    if on_tokens is not None and not callable(on_tokens):
        raise TypeError(f"on_tokens must be callable or None, got {describe(on_tokens)}")


def _check_count(name: str, count: object) -> None:
    if isinstance(count, bool) or not isinstance(count, int):
        raise TypeError(f"{name} must be an int, got {count!r}")
    if count < 0:
        raise ValueError(f"{name} must not be negative, got {count}")
