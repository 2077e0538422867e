"""``n_draft="auto"``: as many drafts as pay, by the time of a round and by what is accepted."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Sequence
from dataclasses import replace
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from mtp_ext.generate.acceptance import Drafts
from mtp_ext.generate.round import Round
from mtp_ext.generate.stopwatch import Stopwatch
from mtp_ext.nn.multi_token_model import MultiTokenModel
from mtp_ext.nn.transformer.kv_cache import KVCache

_log = logging.getLogger(__name__)

_REPEATS = 4  # of a round of each kind, of which the fastest counts; the first is slower
_FEWEST_ROUNDS = 32  # of one row, before acceptance is believed
_GAIN = 1.03  # fewer drafts must promise this, because there is no way back

# By model, and by all else that the time of a round depends on, but for the lengths.
_measured: WeakKeyDictionary[MultiTokenModel, dict[Hashable, tuple[float, ...]]] = WeakKeyDictionary()


def seconds_per_round(round_: Round, tokens: Tensor, drafts: Drafts, cache: KVCache) -> tuple[float, ...]:
    """Returns the seconds of a round with ``0..n_draft`` drafts, which are measured once for a model and batch size.

    The rounds are not kept: the cache is not advanced, and no random number of the caller's is drawn.

    Args:
        round_: The round with the most drafts.
        tokens: ``[B, 1 + n_draft]``, the tokens that it would read next.
        drafts: Those of them that are drafts.
        cache: The tokens before.
    """
    parameter = next(round_.model.parameters())
    sampled = (round_.n_draft, round_.draws_drafts, round_.sampling)
    key = (*sampled, len(tokens), parameter.dtype, parameter.device, torch.get_num_threads())
    known = _measured.setdefault(round_.model, {})
    if key not in known:
        times: list[list[float]] = [[] for _ in range(round_.n_draft + 1)]
        generator = torch.Generator(tokens.device)
        for _ in range(_REPEATS):
            for n_draft, of_kind in enumerate(times):
                watch = Stopwatch(round_.watch.clock)
                trial = replace(round_, n_draft=n_draft, generator=generator, watch=watch)
                first = tokens.new_zeros(len(tokens))
                verdict, following = trial.run(tokens[:, : n_draft + 1], first, drafts.first(n_draft), cache)
                verdict.token.tolist(), following.tokens.tolist()  # waits for a GPU
                watch.lap("host")
                of_kind.append(sum(watch.seconds.values()))
        known[key] = tuple(map(min, times))
    return known[key]


class AutoDraft:
    """Chooses the number of drafts a round during a decode; it only falls.

    Keys and values of a head that once does not run are missing from the cache.

    Args:
        seconds: Of a round with ``0, 1, ...`` drafts.
    """

    def __init__(self, seconds: Sequence[float]) -> None:
        self.seconds, self.n_draft = seconds, len(seconds) - 1
        self._histogram = [0] * len(seconds)
        # What no acceptance could make up for is not tried.
        self._choose([1.0] * self.n_draft, gain=1.0)

    def add(self, n_accepted: Sequence[int], n_drafted: int) -> None:
        """Counts one round of each row, by how many of its ``n_drafted`` drafts were accepted."""
        if n_drafted < self.n_draft:  # where the rows end
            return
        for n in n_accepted:
            self._histogram[n] += 1
        n_rounds = sum(self._histogram)
        if n_rounds >= _FEWEST_ROUNDS:
            self._choose([sum(self._histogram[i:]) / n_rounds for i in range(1, self.n_draft + 1)], _GAIN)

    def _choose(self, accepted: Sequence[float], gain: float) -> None:
        """Chooses by the probability that the first draft is accepted, the second, ..."""
        per_second = [(1 + sum(accepted[:n])) / self.seconds[n] for n in range(self.n_draft + 1)]
        best = max(range(self.n_draft + 1), key=per_second.__getitem__)
        if best < self.n_draft and per_second[best] >= gain * per_second[self.n_draft]:
            times = ", ".join(f"{s * 1e3:.2f}" for s in self.seconds)
            _log.info("%d drafts a round in place of %d: rounds take %s ms", best, self.n_draft, times)
            self.n_draft = best
            self._histogram = [*self._histogram[:best], sum(self._histogram[best:])]
