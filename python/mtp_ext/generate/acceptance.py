"""The two rules that accept drafts without changing what the model would have said by itself."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mtp_ext.generate.sampling import draw


class Drafts(NamedTuple):
    """Tokens proposed to follow the last decided one.

    Attributes:
        tokens: ``[B, m]`` int64.
        probabilities: ``[B, m, V]``, the distributions ``q`` that they were drawn from; None if they were not drawn.
    """

    tokens: Tensor
    probabilities: Tensor | None = None

    def first(self, count: int) -> Drafts:
        """Returns the first ``count`` drafts of each row."""
        q = self.probabilities
        return Drafts(self.tokens[:, :count], None if q is None else q[:, :count])


class Verdict(NamedTuple):
    """How many drafts of each row are accepted, and the token that follows them.

    Attributes:
        n_accepted: ``[B]`` int64, ``0..m``.
        token: ``[B]`` int64.
    """

    n_accepted: Tensor
    token: Tensor


def accept_equal(best: Tensor, drafts: Drafts) -> Verdict:
    """Accepts drafts while they are what greedy decoding takes.

    Args:
        best: ``[B, m + 1]``, head 1's most likely token before each draft and after the last.
        drafts: ``m`` a row.
    """
    n_accepted = _leading(drafts.tokens == best[:, :-1])
    return Verdict(n_accepted, best.gather(1, n_accepted[:, None])[:, 0])


def accept_likely(p: Tensor, drafts: Drafts, generator: torch.Generator | None) -> Verdict:
    """Accepts a draft with probability ``min(1, p / q)``, else draws from ``(p - q)+``: tokens are distributed as ``p``
    (Leviathan et al. 2023, arXiv 2211.17192).

    A draft that was not drawn has ``q = 1``: it is accepted with its own probability, else the token is drawn from
    ``p`` without it.

    Args:
        p: ``[B, m + 1, V]``, head 1's distributions before each draft and after the last.
        drafts: ``m`` a row.
        generator: Random generator on the device of ``p``.
    """
    tokens, q = drafts
    n_drafts, at = tokens.shape[1], tokens[..., None]
    if n_drafts == 0:
        return Verdict(tokens.new_zeros(len(tokens)), draw(p[:, 0], generator))
    chance = p[:, :-1].gather(-1, at)[..., 0]
    proposed = chance.new_ones(()) if q is None else q.gather(-1, at)[..., 0]
    uniform = torch.rand(chance.shape, dtype=p.dtype, device=p.device, generator=generator)  # in [0, 1)
    n_accepted = _leading(uniform * proposed < chance)
    rows = torch.arange(len(tokens), device=tokens.device)
    after, rejected = p[rows, n_accepted], n_accepted.clamp(max=n_drafts - 1)
    if q is None:
        left = after.scatter(-1, tokens[rows, rejected, None], 0.0)
    else:
        left = (after - q[rows, rejected]).clamp(min=0)
    # p is whole without a rejection, and where p and q differ by rounding alone, so that nothing is left.
    whole = (n_accepted == n_drafts)[:, None] | (left.sum(-1, keepdim=True) == 0)
    return Verdict(n_accepted, draw(after.where(whole, left), generator))


def emitted(drafts: Tensor, verdict: Verdict) -> list[list[int]]:
    """Reads each row's accepted drafts and the token after them to the host: the only wait of a round.

    Args:
        drafts: ``[B, m]``, of which the first ``verdict.n_accepted`` are accepted.
        verdict: The decision.
    """
    at = verdict.n_accepted[:, None]
    tokens = F.pad(drafts, (0, 1)).scatter(1, at, verdict.token[:, None])
    return [row[1 : row[0] + 2] for row in torch.cat([at, tokens], dim=1).tolist()]


def _leading(accepted: Tensor) -> Tensor:
    """Counts each row's accepted drafts before the first rejected one: ``[B, m] -> [B]``."""
    return accepted.long().cumprod(1).sum(1)
