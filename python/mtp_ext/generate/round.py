"""One round of self-speculative decoding: a forward of trunk and heads that verifies drafts and makes the next ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mtp_ext.generate.acceptance import Drafts, Verdict, accept_equal, accept_likely
from mtp_ext.generate.sampling import Sampling, draw
from mtp_ext.nn.multi_token_model import MultiTokenModel
from mtp_ext.nn.transformer.kv_cache import KVCache


@dataclass(frozen=True)
class Round:
    """Head 1 verifies the drafts; where it stops, heads 2 to ``n_draft + 1`` draft what follows its next token.

    All these heads read every token, so that each one's keys and values are complete whatever is accepted.

    Args:
        model: The model.
        sampling: How tokens are chosen.
        n_draft: Drafts per row and round; 0 is ordinary decoding.
        draws_drafts: Draw the drafts from the heads' distributions instead of taking their most likely tokens.
        generator: Random generator on the model's device.
    """

    model: MultiTokenModel
    sampling: Sampling
    n_draft: int
    draws_drafts: bool
    generator: torch.Generator | None

    def run(self, tokens: Tensor, first: Tensor, drafts: Drafts, cache: KVCache) -> tuple[Verdict, Drafts]:
        """Reads tokens, decides about the drafts at their end and makes the next ones.

        Args:
            tokens: ``[B, S]``, the next tokens of each row: decided ones, then the drafts, then padding.
            first: ``[B]``, the index among them of the last decided one, after which head 1 verifies.
            drafts: The drafts, ``m`` a row.
            cache: The tokens before; the caller advances it by ``first + 1 + n_accepted``.
        """
        outputs = self.model.cached_outputs(tokens, cache, range(1, self.n_draft + 2))
        rows = torch.arange(len(tokens), device=tokens.device)
        verified = first[:, None] + torch.arange(drafts.tokens.shape[1] + 1, device=tokens.device)
        verdict = self._verify(outputs.pop(1)[rows[:, None], verified], drafts)
        last = first + verdict.n_accepted
        return verdict, self._draft(tokens[:, :0], {k: output[rows, last] for k, output in outputs.items()})

    def _verify(self, normed: Tensor, drafts: Drafts) -> Verdict:
        """Decides about ``m`` drafts from head 1's normed output ``[B, m + 1, D]``."""
        if self.sampling.temperature == 0:
            return accept_equal(self._best(1, normed), drafts)
        return accept_likely(self._probabilities(1, normed), drafts, self.generator)

    def _draft(self, none: Tensor, normed: Mapping[int, Tensor]) -> Drafts:
        """Makes drafts from the other heads' normed outputs ``[B, D]``; ``none [B, 0]`` without such heads."""
        if not normed:
            return Drafts(none)
        if not self.draws_drafts:
            return Drafts(self._each(self._best, normed))
        q = self._each(self._probabilities, normed)
        return Drafts(draw(q, self.generator), q)

    def _each(self, of: Callable[[int, Tensor], Tensor], normed: Mapping[int, Tensor]) -> Tensor:
        """Stacks the result of each head along dimension 1; a shared unembedding is read once."""
        if self.model.heads.shares_unembedding:
            return of(min(normed), torch.stack([*normed.values()], dim=1))
        return torch.stack([of(k, output) for k, output in normed.items()], dim=1)

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
