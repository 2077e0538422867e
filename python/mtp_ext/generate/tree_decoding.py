"""Decoding with a tree of drafts: several tokens of each head, all combinations of which head 1 verifies at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mtp_ext.generate.acceptance import Verdict, emitted
from mtp_ext.generate.round import Round
from mtp_ext.generate.rows import Rows
from mtp_ext.generate.sampling import draw
from mtp_ext.nn.cached_forward import CachedForward
from mtp_ext.nn.multi_token_model import MultiTokenModel
from mtp_ext.nn.transformer.kv_cache import KVCache
from mtp_ext.nn.transformer.token_tree import TokenTree
from mtp_ext.ops.common.checks import check_int, checked_items

MOST_TOKENS = 64  # in a tree: what the decode kernel takes in one pass

Children = list[Tensor]
"""By depth: ``[B, branches]``, the tokens that a head proposes, the most likely first."""


class TreeStep(NamedTuple):
    """What a round gave.

    Attributes:
        verdict: The decision.
        drafts: ``[B, m]``, the drafts on the chosen way, of which the first ``verdict.n_accepted`` are accepted.
        path: ``[B, m + 1]``, the indices of the root and of these among the tokens read.
        children: The next drafts.
    """

    verdict: Verdict
    drafts: Tensor
    path: Tensor
    children: Children


@dataclass(frozen=True, kw_only=True)
class TreeRound(Round):
    """A round whose drafts are a tree.

    At each of its tokens head 1 chooses what follows: its most likely token, or one drawn from its distribution. While
    that is in the tree, it is accepted. So tokens are those, or distributed as those, of ordinary decoding.

    Args:
        tree: The form of the tokens read: the last decided one, and the drafts.
    """

    tree: TokenTree

    def start(self, tokens: Tensor, last: Tensor, cache: KVCache) -> tuple[Tensor, Children]:
        """Reads prompts ``[B, S]``, padded behind the index ``last [B]``; returns the next token ``[B]`` and drafts."""
        forward = self._forward(tokens, cache, None)
        token = self._choose(forward.outputs((1,), last[:, None])[1])[:, 0]
        self.watch.lap("unembedding")
        return token, self._propose(forward, last[:, None])

    def read(self, token: Tensor, children: Children, cache: KVCache) -> TreeStep:
        """Reads decided tokens ``[B]`` and the drafts after them; the caller keeps the path in the cache."""
        copies = zip(children, self.tree.levels[:-1], strict=True)
        tokens = torch.cat([token[:, None], *(x.repeat(1, parents) for x, parents in copies)], dim=1)
        forward = self._forward(tokens, cache, self.tree)
        every = torch.arange(self.tree.size, device=tokens.device).expand(len(tokens), -1)
        chosen = self._choose(forward.outputs((1,), every)[1])
        path, n_accepted = self.tree.path(chosen, children)
        last = path[:, -1:]
        verdict = Verdict(n_accepted, chosen.gather(1, last)[:, 0])
        self.watch.lap("unembedding")
        return TreeStep(verdict, tokens.gather(1, path[:, 1:]), path, self._propose(forward, last))

    def _forward(self, tokens: Tensor, cache: KVCache, tree: TokenTree | None) -> CachedForward:
        self.watch.lap("host")
        forward = CachedForward(self.model, tokens, cache, range(1, self.n_draft + 2), tree)
        self.watch.lap("trunk")
        return forward

    def _choose(self, normed: Tensor) -> Tensor:
        """Head 1's tokens after its normed outputs ``[B, Q, D]``: ``[B, Q]``."""
        self.watch.lap("heads")
        if self.sampling.temperature == 0:
            return self._best(1, normed)
        return draw(self._probabilities(1, normed), self.generator)

    def _propose(self, forward: CachedForward, last: Tensor) -> Children:
        """The other heads' most likely tokens after the token ``last [B, 1]``."""
        outputs = forward.outputs(range(2, self.n_draft + 2), last)
        self.watch.lap("heads")
        heads, branches = self.model.heads, self.tree.branches
        if heads.shares_unembedding:
            rows = torch.cat([*outputs.values()], dim=1)
            best = heads.best_classes(2, rows.flatten(0, 1), max(branches))[1].view(*rows.shape[:2], -1)
            children = [best[:, i, :count] for i, count in enumerate(branches)]
        else:
            counts = zip(outputs.items(), branches, strict=True)
            children = [heads.best_classes(k, output[:, 0], count)[1] for (k, output), count in counts]
        self.watch.lap("unembedding")
        return children


def decode_with_tree(round_: TreeRound, prompts: list[Tensor], rows: Rows) -> None:
    """Fills ``rows``; rows that have ended continue as padding until the last one ends."""
    lengths = [len(prompt) for prompt in prompts]
    cache = KVCache(len(prompts), max(lengths) + rows.max_new_tokens - 1 + round_.tree.size)
    tokens = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True)
    token, children = round_.start(tokens, torch.tensor(lengths, device=tokens.device) - 1, cache)
    rows.add([[i] for i in token.tolist()], 0)
    cache.advance(lengths)
    round_.watch.lap_of_all("prompt")
    while rows.running:
        cache.follow(rows.running)
        verdict, drafts, path, children = round_.read(token, children, cache)
        new, token = emitted(drafts, verdict), verdict.token
        rows.add(new, round_.tree.size - 1)
        cache.keep(path)
        cache.advance([len(row) for row in new])
    round_.watch.lap("host")


def checked_tree(model: MultiTokenModel, tree: object, n_draft: object, draft: str) -> TokenTree | None:
    """Checks ``tree`` together with the other arguments of drafting."""
    if tree is None:
        return None
    branches = checked_items("tree", tree, "numbers of drafts by position")
    for count in branches:
        check_int("tree", count)
    heads, counts = model.heads, tuple(map(int, branches))
    if heads.reads_tokens:
        raise ValueError("tree must be None where heads read the tokens that they draft")
    if draft != "greedy":
        raise ValueError(f"draft must be 'greedy' with a tree, got {draft!r}")
    if not 1 <= len(counts) <= heads.n_heads - 1 or any(not 1 <= count <= heads.vocab_size for count in counts):
        raise ValueError(
            f"tree must hold 1 to {heads.n_heads - 1} numbers of at least 1, one for each of heads 2 to "
            f"{heads.n_heads} that drafts, got {list(counts)}"
        )
    if n_draft is not None and n_draft != len(counts):
        raise ValueError(f"n_draft must be None or the length of tree, {len(counts)}, got {n_draft!r}")
    made = TokenTree(counts)
    if made.size > MOST_TOKENS:
        raise ValueError(f"tree must have at most {MOST_TOKENS} tokens with its root, got {made.size}")
    return made
