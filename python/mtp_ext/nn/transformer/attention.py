"""Causal grouped-query attention within documents, and the context that all layers of a forward share."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtp_ext.nn.config import MTPConfig
from mtp_ext.nn.transformer.kv_cache import KVCache, Slots
from mtp_ext.nn.transformer.linear import Linear
from mtp_ext.nn.transformer.rotary import rotate, rotation
from mtp_ext.nn.transformer.token_tree import TokenTree
from mtp_ext.ops.common.backend import can_read

# If documents are shorter than this on average, use one masked call per row instead of one call per document: at 64
# tokens both take the same time.
_MIN_MEAN_SEGMENT = 64

# torch's CPU kernel takes queries in blocks of 32. In bfloat16 oneDNN compiles the products for every length and keeps
# them, several MiB for each new length of a document. Documents are padded to whole blocks, which none of their tokens
# sees.
_QUERY_BLOCK = 32


@dataclass(frozen=True)
class AttentionContext:
    """Positions and visibility of one forward, built once and read by every attention layer of trunk and heads.

    Rotary positions count from the start of the row, not of the document: attention within a document depends only on
    position differences.
    """

    turns: Tensor  # rotary, [S, 1, head_dim / 2] or [B, S, 1, head_dim / 2]
    mask: Tensor | None = None  # [B or 1, 1, S, L] bool, True where the query sees the key; None: causal
    segments: list[int] | None = None  # lengths of the documents, over the B * S tokens in order
    cache: KVCache | None = None
    slots: Slots | None = None  # of the new tokens in the cache
    tree: TokenTree | None = None  # of the new tokens
    queries: Tensor | None = None  # [B, Q] indices of the tokens whose output is wanted; None: all
    tokens: Tensor | None = None  # [B, S''] the row's tokens and those after it, for heads that read them

    @staticmethod
    def of_sequences(
        config: MTPConfig, seq_len: int, document_ids: Tensor | None, device: torch.device, dtype: torch.dtype
    ) -> AttentionContext:
        """Builds the context of whole sequences (training).

        Args:
            config: The model's configuration.
            seq_len: ``S``.
            document_ids: ``[B, S]`` integers; tokens see earlier ones of the same id. None: one document per row.
            device, dtype: Device and dtype of the activations.
        """
        turns = rotation(torch.arange(seq_len, device=device), config.head_dim, config.rope_theta, dtype)
        if document_ids is None or seq_len == 0:
            return AttentionContext(turns)
        if can_read(document_ids):
            lengths = document_lengths(document_ids)
            if lengths is not None and len(lengths) == document_ids.shape[0]:
                return AttentionContext(turns)
            if lengths is not None and len(lengths) * _MIN_MEAN_SEGMENT <= document_ids.numel():
                return AttentionContext(turns, segments=lengths)
        causal = torch.ones(seq_len, seq_len, dtype=torch.bool, device=device).tril_()
        same = document_ids[:, :, None] == document_ids[:, None, :]
        return AttentionContext(turns, mask=(same & causal)[:, None])

    @staticmethod
    def of_cached(
        config: MTPConfig,
        n_new: int,
        cache: KVCache,
        device: torch.device,
        dtype: torch.dtype,
        n_again: int = 0,
        tree: TokenTree | None = None,
    ) -> AttentionContext:
        """Builds the context of each row's last ``n_again`` tokens in ``cache`` and the ``n_new`` after them.

        The new ones may be a ``tree``: alternatives for one position, whose slots are not their positions.
        """
        slots = cache.slots(n_new, device, n_again)
        if tree is not None:
            depths = slots.positions[..., :1] + tree.tables(device).depths
            turns = rotation(depths, config.head_dim, config.rope_theta, dtype)
            every = torch.arange(n_new, device=device).expand(cache.batch_size, -1)
            mask = _visible_in_tree(every, slots, tree)
            return AttentionContext(turns, mask=mask, cache=cache, slots=slots, tree=tree)
        turns = rotation(slots.positions, config.head_dim, config.rope_theta, dtype)
        # No mask is needed for the first tokens (no query sees the right padding) or for a single one (it sees all).
        uniform, length = slots.positions.dim() == 1, slots.positions.shape[-1]
        plain = uniform and (length == slots.end or length == 1)
        return AttentionContext(
            turns, mask=None if plain else _visible(slots.positions, slots), cache=cache, slots=slots
        )

    def at(self, queries: Tensor) -> AttentionContext:
        """Returns the context of a layer that gives the outputs of the new tokens ``queries [B, Q]`` alone."""
        assert self.slots is not None, "the context of a cache"
        if self.tree is not None:
            return replace(self, queries=queries, mask=_visible_in_tree(queries, self.slots, self.tree))
        positions = self.slots.positions.expand(len(queries), -1).gather(1, queries)
        return replace(self, queries=queries, mask=_visible(positions, self.slots))

    def of_queries(self, x: Tensor) -> Tensor:
        """Returns what belongs to the tokens whose output is wanted: ``[B, S, ...] -> [B, Q, ...]``."""
        return x if self.queries is None else taken(x, self.queries)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Computes the attention of ``q [B, S, H, d]`` to ``k, v [B, L, H_kv, d]``: ``[B, S, H, d]``."""
        if self.segments is None:
            # Lengths are only compared with a cache: under torch.compile they may be symbolic, which sdpa refuses here.
            sees_all = self.cache is not None and q.shape[1] != k.shape[1]
            return _attend(q, k, v, mask=self.mask, is_causal=self.mask is None and not sees_all)
        split = (torch.split(x.flatten(0, 1)[None], self.segments, dim=1) for x in (q, k, v))
        step = _QUERY_BLOCK if q.dtype == torch.bfloat16 and q.device.type == "cpu" else 1
        parts = []
        for length, document in zip(self.segments, zip(*split, strict=True), strict=True):
            if missing := -length % step:
                document = tuple(F.pad(x, (0, 0, 0, 0, 0, missing)) for x in document)
            parts.append(_attend(*document, mask=None, is_causal=True)[:, :length])
        return torch.cat(parts, dim=1).view(q.shape)


def taken(x: Tensor, at: Tensor) -> Tensor:
    """Returns ``x [B, S, ...]`` at the indices ``at [B, Q]``: ``[B, Q, ...]``."""
    return x[torch.arange(len(at), device=at.device)[:, None], at]


def _visible(positions: Tensor, slots: Slots) -> Tensor:
    """Mask of queries at ``positions [B, Q]`` or ``[Q]``: ``[B or 1, 1, Q, L]``, True for the keys not after them."""
    keys = torch.arange(slots.end, device=positions.device)
    return (keys <= positions[..., None]).view(-1, 1, positions.shape[-1], slots.end)


def _visible_in_tree(queries: Tensor, slots: Slots, tree: TokenTree) -> Tensor:
    """Mask of the new tokens ``queries [B, Q]``: ``[B, 1, Q, L]``, True for earlier tokens, ancestors and itself."""
    new = torch.arange(slots.end, device=queries.device) - slots.positions[..., :1]  # [L] or [B, L]
    of_tree = (new >= 0) & (new < tree.size)
    ancestors = tree.tables(queries.device).ancestors[queries]  # [B, Q, S]
    index = new.clamp(0, tree.size - 1).expand(len(queries), -1)[:, None].expand(-1, queries.shape[1], -1)
    seen = torch.where(of_tree.expand(len(queries), -1)[:, None], ancestors.gather(2, index), (new < 0)[..., None, :])
    return seen[:, None]


def document_lengths(document_ids: Tensor) -> list[int] | None:
    """Lengths of the runs of equal ids in ``[B, S]``, row by row; None if an id recurs within a row."""
    batch, seq_len = document_ids.shape
    starts = torch.ones(batch, seq_len, dtype=torch.bool, device=document_ids.device)
    starts[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    first = starts.flatten().nonzero().flatten()
    lengths: list[int] = torch.diff(first, append=torch.tensor([batch * seq_len], device=first.device)).tolist()
    if len(lengths) > batch:
        runs = torch.stack([first // seq_len, document_ids.flatten()[first]])
        if len(torch.unique(runs, dim=1)[0]) < len(lengths):
            return None
    return lengths


def _attend(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None, is_causal: bool) -> Tensor:
    n_queries = q.shape[1]
    if n_queries == 1 and q.dtype == torch.bfloat16 and q.device.type == "cpu":
        # torch's products of one query take 1.8 to 2.9 times as long as those of two (80 and 512 keys, 1 and 8 rows).
        q = F.pad(q, (0, 0, 0, 0, 0, 1))
    y = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=is_causal,
        enable_gqa=bool(q.shape[2] != k.shape[2]),  # torch.jit.trace compares sizes as tensors
    )
    return y.transpose(1, 2)[:, :n_queries]


class Attention(nn.Module):
    """Multi-head attention with rotary positions; ``n_kv_heads`` groups of query heads share keys and values.

    Args:
        config: The model's configuration.
        layer: The layer's index in the key-value cache.
    """

    def __init__(self, config: MTPConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.n_heads, self.kv_heads, self.head_dim = config.n_attn_heads, config.kv_heads, config.head_dim
        self.qkv = Linear(config.d_model, (self.n_heads + 2 * self.kv_heads) * self.head_dim)
        self.out = Linear(self.n_heads * self.head_dim, config.d_model)

    def forward(self, x: Tensor, context: AttentionContext) -> Tensor:
        """Maps ``[B, S, D] -> [B, S, D]``, or to ``[B, Q, D]`` where the context wants ``Q`` queries."""
        n_heads, kv_heads = self.n_heads, self.kv_heads
        qkv = torch.unflatten(self.qkv(x), -1, (n_heads + 2 * kv_heads, self.head_dim))
        qk, v = torch.split(qkv, [n_heads + kv_heads, kv_heads], dim=2)
        q, k = torch.split(rotate(qk, context.turns), [n_heads, kv_heads], dim=2)
        if context.cache is not None and context.slots is not None:
            k, v = context.cache.write(self.layer, k, v, context.slots)
        y: Tensor = self.out(context.attend(context.of_queries(q), k, v).flatten(2))
        return y
