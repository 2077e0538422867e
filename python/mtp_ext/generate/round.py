"""One round of self-speculative decoding: a forward of trunk and heads that verifies drafts and makes the next ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from mtp_ext.generate.acceptance import Drafts, Verdict, accept_equal, accept_likely
from mtp_ext.generate.sampling import Sampling, draw
from mtp_ext.generate.stopwatch import Stopwatch
from mtp_ext.nn.cached_forward import CachedForward
from mtp_ext.nn.multi_token_model import MultiTokenModel
from mtp_ext.nn.transformer.attention import taken
from mtp_ext.nn.transformer.kv_cache import KVCache
from mtp_ext.ops.top_classes import uses_kernel


@dataclass(frozen=True)
class Round:
    """Head 1 verifies the drafts; where it stops, heads 2 to ``n_draft + 1`` draft what follows its next token.

    Each of these heads reads every token, so that its keys and values are complete whatever is accepted.

    Args:
        model: The model.
        sampling: How tokens are chosen.
        n_draft: Drafts per row and round; 0 is ordinary decoding.
        draws_drafts: Draw the drafts from the heads' distributions instead of taking their most likely tokens.
        generator: Random generator on the model's device.
        watch: Measures the parts of the round.
    """

    model: MultiTokenModel
    sampling: Sampling
    n_draft: int
    draws_drafts: bool
    generator: torch.Generator | None
    watch: Stopwatch = field(default_factory=Stopwatch)

    def run(self, tokens: Tensor, first: Tensor, drafts: Drafts, cache: KVCache) -> tuple[Verdict, Drafts]:
        """Reads tokens, decides about the drafts at their end and makes the next ones.

        Args:
            tokens: ``[B, S]``, the next tokens of each row: decided ones, then the drafts, then padding.
            first: ``[B]``, the index among them of the last decided one, after which head 1 verifies.
            drafts: The drafts, ``m`` a row.
            cache: The tokens before; the caller advances it by ``first + 1 + n_accepted``.
        """
        in_turn = self.model.heads.reads_tokens
        later = range(2, self.n_draft + 2)
        self.watch.lap("host")
        forward = CachedForward(self.model, tokens, cache, (1,) if in_turn else (1, *later))
        self.watch.lap("trunk")
        verified = first[:, None] + torch.arange(drafts.tokens.shape[1] + 1, device=tokens.device)
        if later and self._is_read_once(forward.hidden, (1 + len(later)) * verified.numel()):
            return self._verify_and_draft(forward.outputs((1, *later), verified), drafts)
        normed = forward.outputs((1,), verified)[1]
        self.watch.lap("heads")
        verdict = self._verify(normed, drafts)
        self.watch.lap("unembedding")
        last = (first + verdict.n_accepted)[:, None]
        if in_turn and self.n_draft:
            return verdict, self._draft_in_turn(forward, tokens, verdict.token, last)
        outputs = forward.outputs(later, last) if later else {}
        self.watch.lap("heads")
        following = self._draft(tokens[:, :0], outputs)
        self.watch.lap("unembedding")
        return verdict, following

    def _is_read_once(self, hidden: Tensor, n_rows: int) -> bool:
        """Returns True if one product with the unembedding is faster than one to verify and one to draft.

        One needs ``n_rows``: all heads wherever head 1 verifies. That is free in the GPU's kernel, which waits for the
        unembedding. On the CPU arithmetic counts: 16 rows take longer than twice 4.
        """
        heads = self.model.heads
        if self.sampling.temperature > 0 or not heads.shares_unembedding or heads.reads_tokens:
            return False
        return uses_kernel(hidden.new_empty(n_rows, hidden.shape[-1]), heads.unembedding, 1)

    def _verify_and_draft(self, normed: Mapping[int, Tensor], drafts: Drafts) -> tuple[Verdict, Drafts]:
        """Decides about ``m`` drafts and makes the next from all heads' normed outputs ``[B, m + 1, D]``."""
        self.watch.lap("heads")
        best = self._best(1, torch.stack([*normed.values()], dim=2))  # [B, m + 1, n]
        verdict = accept_equal(best[..., 0], drafts)
        following = Drafts(taken(best, verdict.n_accepted[:, None])[:, 0, 1:])
        self.watch.lap("unembedding")
        return verdict, following

    def _verify(self, normed: Tensor, drafts: Drafts) -> Verdict:
        """Decides about ``m`` drafts from head 1's normed output ``[B, m + 1, D]``."""
        if self.sampling.temperature == 0:
            return accept_equal(self._best(1, normed), drafts)
        return accept_likely(self._probabilities(1, normed), drafts, self.generator)

    def _draft(self, none: Tensor, normed: Mapping[int, Tensor]) -> Drafts:
        """Makes drafts from other heads' normed outputs ``[B, 1, D]``; ``none [B, 0]`` without such heads."""
        if not normed:
            return Drafts(none)
        if not self.draws_drafts:
            return Drafts(self._each(self._best, normed))
        q = self._each(self._probabilities, normed)
        return Drafts(draw(q, self.generator), q)

    def _draft_in_turn(self, forward: CachedForward, tokens: Tensor, token: Tensor, last: Tensor) -> Drafts:
        """Makes drafts with heads that read tokens: each reads the draft of the one before it.

        Head ``k`` reads up to ``k - 2`` drafts, at the last ``k - 2`` tokens of a round. It reads these tokens again
        in the next one, with what was decided in the place of the drafts.

        Args:
            forward: The forward of ``tokens``.
            tokens: ``[B, S]``, the new tokens.
            token: ``[B]``, the token decided after them.
            last: ``[B, 1]``, the index among them of the last one that was decided or accepted.
        """
        heads = self.model.heads
        window = forward.window(tokens, self.n_draft - 1, self.n_draft + 1)
        last = last + window.n_again
        ahead = window.tokens.scatter(1, last + 1, token[:, None])
        x, made = window.hidden, list[Drafts]()
        for k in range(2, self.n_draft + 2):
            x, normed = heads.run(k, x, replace(window.context, tokens=ahead))
            self.watch.lap("heads")
            made.append(self._draft(tokens[:, :0], {k: taken(normed, last)}))
            self.watch.lap("unembedding")
            ahead = ahead.scatter(1, last + k, made[-1].tokens)
        q = [drafts.probabilities for drafts in made if drafts.probabilities is not None]
        return Drafts(torch.cat([drafts.tokens for drafts in made], dim=1), torch.cat(q, dim=1) if q else None)

    def _each(self, of: Callable[[int, Tensor], Tensor], normed: Mapping[int, Tensor]) -> Tensor:
        """Joins the results of the heads along dimension 1; a shared unembedding is read once."""
        if self.model.heads.shares_unembedding:
            return of(min(normed), torch.cat([*normed.values()], dim=1))
        return torch.cat([of(k, output) for k, output in normed.items()], dim=1)

    def _best(self, k: int, normed: Tensor) -> Tensor:
        """Head ``k``'s most likely tokens, ``[..., D] -> [...]``."""
        return self.model.heads.best_classes(k, normed.flatten(0, -2), 1)[1].view(normed.shape[:-1])

    def _probabilities(self, k: int, normed: Tensor) -> Tensor:
        """Head ``k``'s distributions after temperature, top-k and top-p, ``[..., D] -> [..., V]``."""
        heads, n_best = self.model.heads, self.sampling.n_best
        if n_best is None:
            return self.sampling.probabilities(heads.logits(k, normed))
        logits, classes = heads.best_classes(k, normed.flatten(0, -2), min(n_best, heads.vocab_size))
        p = self.sampling.probabilities_of_best(logits, classes, heads.vocab_size)
        return p.view(*normed.shape[:-1], heads.vocab_size)
