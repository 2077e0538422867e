"""A forward of tokens that follow those in a key-value cache: the trunk, then heads where they are wanted."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mtp_ext.nn.multi_token_model import MultiTokenModel
from mtp_ext.nn.schedules.head_stack import head_outputs
from mtp_ext.nn.transformer.attention import taken
from mtp_ext.nn.transformer.kv_cache import KVCache
from mtp_ext.nn.transformer.token_tree import TokenTree
from mtp_ext.nn.transformer.trunk import Trunk

# The layer of the cache that keeps the trunk's output and the tokens, for heads that read them.
_TRUNK_OUTPUT = -1


class Window(NamedTuple):
    """The new tokens of a forward and the last ones before them, for heads that read tokens.

    Attributes:
        hidden: ``[B, W, D]``, the trunk's output.
        tokens: ``[B, W + n_ahead]``, the tokens and room for those that follow.
        context: The context of their layers.
        n_again: ``[B, 1]``, how many of each row's are not new.
    """

    hidden: Tensor
    tokens: Tensor
    context: Any
    n_again: Tensor


class CachedForward:
    """The trunk's output of new tokens, from which heads run when they are asked for.

    Keys and values of the new tokens are added to the cache by the trunk and by the heads that run, always for all of
    these tokens. Independent heads compute the rest, three quarters of a transformer layer, only where it is asked for:
    what head 1 gives can decide where the others are wanted. Chained heads read each other's outputs at all tokens and
    run together.

    Args:
        model: The model.
        tokens: ``[B, S]``, the next tokens of each row, padded on the right.
        cache: Keys and values of the previous tokens; the caller advances it.
        active: All heads that will be asked for, ``1..n``.
        tree: The form of ``tokens``, if they do not follow each other.
    """

    def __init__(
        self,
        model: MultiTokenModel,
        tokens: Tensor,
        cache: KVCache,
        active: Collection[int],
        tree: TokenTree | None = None,
    ) -> None:
        self.model, self.heads, self.cache, self.active = model, model.heads, cache, active
        self.context = model.cached_context(tokens, cache, tree)
        self.hidden = model.run_trunk(tokens, None, self.context)
        self._of_chain: dict[int, Tensor] = {}

    def outputs(self, wanted: Collection[int], at: Tensor) -> dict[int, Tensor]:
        """Returns the normed outputs ``[B, Q, D]`` of heads, the input of :meth:`Heads.logits`.

        Args:
            wanted: The heads, among the active ones; each is asked for once.
            at: ``[B, Q]``, different indices of new tokens in ascending order.
        """
        heads, hidden = self.heads, self.hidden
        if any(len(chain) > 1 for chain in heads.chains):
            self._of_chain = self._of_chain or head_outputs(heads, hidden, self.context, self.active)
            return {k: taken(self._of_chain[k], at) for k in wanted}
        if at.shape[1] == hidden.shape[1]:
            return head_outputs(heads, hidden, self.context, wanted)
        found: dict[int, Tensor] = {}
        if token_wise := [k for k in wanted if not heads.head(k).reads_context]:
            found |= head_outputs(heads, taken(hidden, at), self.context, token_wise)
        if narrow := [k for k in wanted if heads.head(k).takes_queries]:
            found |= head_outputs(heads, hidden, self.context.at(at), narrow)
        wide = sorted({*wanted} - {*found})
        return found | {k: taken(heads.run(k, hidden, self.context)[1], at) for k in wide}

    def window(self, tokens: Tensor, n_again: int, n_ahead: int) -> Window:
        """Returns the new tokens after the last ``n_again`` before them; keeps them in the cache for later windows.

        Args:
            tokens: ``[B, S]``, the new tokens.
            n_again: The most tokens that heads read again.
            n_ahead: Tokens that follow.
        """
        cache, device = self.cache, tokens.device
        stored = (self.hidden[:, :, None], tokens[..., None, None])
        hidden, known = cache.write(_TRUNK_OUTPUT, *stored, self.context.slots)
        trunk = self.model.trunk
        assert isinstance(trunk, Trunk), "only MTPModel has heads that read tokens"
        context = trunk.context(tokens, cache=cache, n_again=n_again)
        assert context.slots is not None
        positions = context.slots.positions.expand(len(tokens), -1)
        ahead = positions[:, :1] + torch.arange(positions.shape[1] + n_ahead, device=device)
        return Window(
            taken(hidden[:, :, 0], positions),
            taken(known[:, :, 0, 0], ahead.clamp(max=known.shape[1] - 1)),
            context,
            torch.tensor(cache.lengths, device=device)[:, None] - positions[:, :1],
        )
