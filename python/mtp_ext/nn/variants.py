"""What tells the architectures of the heads apart: their layers, and which head reads which.

The five of Gloeckle et al. 2024 (appendix B), and two more that users of multi-token prediction know.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

Chains = tuple[tuple[int, ...], ...]


class Variant(NamedTuple):
    """One architecture.

    Attributes:
        layer: What a head has between its input and its final norm: a transformer layer, one matrix, or nothing;
            "module" is a transformer layer that also reads the embeddings of later tokens, in all heads but the first.
        order: Which head reads which: "independent" heads all read the trunk; "outward", head ``k`` reads head
            ``k - 1`` and head 1 the trunk; "inward", head ``k`` reads head ``k + 1`` and head ``n`` the trunk.
        own_unembedding: Whether each head has an unembedding of its own.
        one_norm: Whether there is one final norm whatever the configuration says.
    """

    layer: Literal["transformer", "linear", "module", "none"]
    order: Literal["independent", "outward", "inward"]
    own_unembedding: bool = False
    one_norm: bool = False

    def n_layers(self, n_future: int) -> int:
        """Transformer layers of ``n_future`` heads together."""
        return {"transformer": n_future, "module": n_future - 1}.get(self.layer, 0)


VARIANTS: dict[str, Variant] = {
    "parallel": Variant("transformer", "independent"),
    "linear": Variant("linear", "independent"),
    "replicated": Variant("none", "independent", own_unembedding=True),
    "causal": Variant("transformer", "outward"),
    "anticausal": Variant("transformer", "inward"),
    # DeepSeek-V3 (arXiv 2412.19437, section 2.2).
    "sequential_modules": Variant("module", "outward"),
    # n targets on one row of logits: the heads have nothing of their own.
    "shared": Variant("none", "independent", one_norm=True),
}


def chains_of(variant: str, n_heads: int) -> Chains:
    """The order in which heads run: each chain starts at the trunk, and its heads read one another in turn.

    Args:
        variant: One of :data:`VARIANTS`.
        n_heads: ``n``; heads are ``1..n``.
    """
    forward = tuple(range(1, n_heads + 1))
    order = VARIANTS[variant].order
    if order == "outward":
        return (forward,)
    if order == "inward":
        return (forward[::-1],)
    return tuple((k,) for k in forward)


def check_variant(variant: object) -> None:
    """Raises ValueError for a name that is no architecture."""
    if variant not in VARIANTS:
        raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {variant!r}")
