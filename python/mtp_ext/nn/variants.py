"""The table of architectures: the layers of the heads, and which head reads which.

It has the five of Gloeckle et al. 2024 (appendix B) and two more in common use. A new kind of head takes a
:class:`HeadLayer`, a row of :data:`VARIANTS` and a module.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

Chains = tuple[tuple[int, ...], ...]


class HeadLayer(NamedTuple):
    """The layer between a head's input and its final norm.

    Attributes:
        module: ``"package.module:name"`` of its factory, called with ``(config, layer, k)``: the model's configuration,
            the layer's index in the key-value cache, and the head ``1..n``. None for heads without a layer.
        blocks: Number of transformer layers in it.
        matrices: Number of ``[D, D]`` matrices besides those.
        vectors: Number of ``[D]`` vectors besides those.
        first_head: The first head with such a layer.
    """

    module: str | None
    blocks: int = 0
    matrices: int = 0
    vectors: int = 0
    first_head: int = 1

    def count(self, n_future: int) -> int:
        """Returns how many of ``n_future`` heads have the layer."""
        return 0 if self.module is None else n_future - self.first_head + 1


NO_LAYER = HeadLayer(None)
LINEAR = HeadLayer("mtp_ext.nn.heads.layers:linear_layer", matrices=1)
TRANSFORMER = HeadLayer("mtp_ext.nn.heads.layers:transformer_layer", blocks=1)
# A transformer layer that also reads the embedding of a later token (DeepSeek-V3, arXiv 2412.19437, section 2.2).
DEEPSEEK_MODULE = HeadLayer(
    "mtp_ext.nn.heads.deepseek_module:SequentialModule", blocks=1, matrices=2, vectors=2, first_head=2
)


class Variant(NamedTuple):
    """One architecture.

    Attributes:
        layer: The layer of each head.
        order: Which head reads which: "independent" heads all read the trunk; "outward", head ``k`` reads head
            ``k - 1`` and head 1 the trunk; "inward", head ``k`` reads head ``k + 1`` and head ``n`` the trunk.
        own_unembedding: Whether each head has its own unembedding.
        one_norm: Whether all heads share one final norm, regardless of the configuration.
    """

    layer: HeadLayer
    order: Literal["independent", "outward", "inward"]
    own_unembedding: bool = False
    one_norm: bool = False

    def n_layers(self, n_future: int) -> int:
        """Returns the total number of transformer layers of ``n_future`` heads."""
        return self.layer.blocks * self.layer.count(n_future)


VARIANTS: dict[str, Variant] = {
    "parallel": Variant(TRANSFORMER, "independent"),
    "linear": Variant(LINEAR, "independent"),
    "replicated": Variant(NO_LAYER, "independent", own_unembedding=True),
    "causal": Variant(TRANSFORMER, "outward"),
    "anticausal": Variant(TRANSFORMER, "inward"),
    "sequential_modules": Variant(DEEPSEEK_MODULE, "outward"),
    # n targets on one row of logits: the heads have no parameters of their own.
    "shared": Variant(NO_LAYER, "independent", one_norm=True),
}


def chains_of(variant: str, n_heads: int) -> Chains:
    """Returns the order in which heads run: each chain starts at the trunk, and each head reads the previous one.

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
    """Raises ValueError for an unknown architecture."""
    if not isinstance(variant, str) or variant not in VARIANTS:
        raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {variant!r}")
