"""Configuration of a multi-token prediction model."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from mtp_ext.nn.variants import VARIANTS, Variant, check_variant

_FEED_FORWARD_MULTIPLE = 64


class Shape(NamedTuple):
    """A model of the paper: width, total transformer layers (trunk and heads), attention heads."""

    d_model: int
    n_layers: int
    n_attn_heads: int


# Paper, appendix M; the names are nominal parameter counts.
PRESETS: dict[str, Shape] = {
    # Synthetic tasks.
    "1M": Shape(128, 5, 4),
    "3M": Shape(256, 4, 8),
    "10M": Shape(384, 6, 8),
    "30M": Shape(512, 10, 8),
    "100M": Shape(768, 14, 12),
    "300M": Shape(1024, 25, 16),
    "1B": Shape(1536, 36, 24),
    # Code models.
    "0.3B": Shape(1024, 18, 16),
    "0.6B": Shape(1280, 27, 20),
    "1.3B": Shape(2048, 24, 16),
    "3B": Shape(2560, 36, 20),
    "6.7B": Shape(4096, 32, 32),
    "13B": Shape(5120, 40, 40),
}


@dataclass(frozen=True)
class MTPConfig:
    """Configuration of an :class:`mtp_ext.nn.MTPModel`.

    ``n_layers`` counts the transformer layers of the whole model, as in the paper, which compares models of equal size
    (section 2): a model of ``L`` layers has ``L - n_future`` trunk layers and ``n_future`` heads of one layer each, so
    ``n_future=1`` is an ordinary model of ``L`` layers. With ``L == n_future`` the heads read the embeddings. Heads
    without transformer layers ("linear", "replicated", "shared") take none from the trunk; those of
    "sequential_modules" take one each, except the first.

    Args:
        vocab_size: ``V``.
        d_model: ``D``, the width of the trunk.
        n_layers: Total transformer layers, trunk and heads.
        n_attn_heads: Attention heads per layer; ``d_model / n_attn_heads`` must be even (rotary pairs).
        n_kv_heads: Key-value heads of grouped-query attention; default ``n_attn_heads``.
        d_ff: Inner width of the SwiGLU; default ``8/3 * d_model`` rounded up to a multiple of 64.
        max_seq_len: Maximum sequence length.
        n_future: ``n``, the number of heads; head ``k`` in ``1..n`` predicts token ``t + k``.
        variant: Architecture of the heads: "parallel", "linear", "replicated", "causal", "anticausal" (paper, Appendix
            B), "sequential_modules" (DeepSeek-V3), or "shared" (n targets on one row of logits).
        tie_embeddings: Tie the unembedding to the embedding (the paper does not). If replicated, ties head 1's.
        replicate_unembedding: Give each head its own unembedding, as "replicated" always does.
        shared_final_norm: One final RMSNorm for all heads instead of one each.
        softcap: Logits become ``softcap * tanh(logits / softcap)`` (Gemma 2); default: no cap.
        dropout: Dropout probability of what each layer adds to the residual stream, in training.
        rope_theta: Base of the rotary frequencies.
        norm_eps: Added to the mean square in RMSNorm.
        init_std: Standard deviation of the initial matrices; default ``1 / sqrt(fan_in)``, which keeps unit variance.
        embed_init_std: Standard deviation of the embedding; default 1, the scale of the residual stream, or
            ``unembed_init_std`` if tied.
        unembed_init_std: Standard deviation of the unembedding: small, so that the first loss is close to ``ln V``.
        residual_init_scale: Multiplies ``init_std`` in the matrices that write to the residual stream; default
            ``1 / sqrt(2 * layers on the path to a head)``. With 0 every layer starts as the identity.

    Raises:
        TypeError, ValueError: A field of wrong type or out of range, or conflicting fields.
    """

    vocab_size: int
    d_model: int
    n_layers: int
    n_attn_heads: int
    n_kv_heads: int | None = None
    d_ff: int | None = None
    max_seq_len: int = 4096
    n_future: int = 4
    variant: str = "parallel"
    tie_embeddings: bool = False
    replicate_unembedding: bool = False
    shared_final_norm: bool = False
    softcap: float | None = None
    dropout: float = 0.0
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    init_std: float | None = None
    embed_init_std: float | None = None
    unembed_init_std: float = 0.02
    residual_init_scale: float | None = None

    def __post_init__(self) -> None:
        for name in ("vocab_size", "d_model", "n_layers", "n_attn_heads", "max_seq_len", "n_future"):
            _check_count(name, getattr(self, name))
        for name in ("n_kv_heads", "d_ff"):
            if getattr(self, name) is not None:
                _check_count(name, getattr(self, name))
        for name in ("tie_embeddings", "replicate_unembedding", "shared_final_norm"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
        for name in ("rope_theta", "norm_eps"):
            _check_number(name, getattr(self, name), allow_zero=False)
        if self.softcap is not None:
            _check_number("softcap", self.softcap, allow_zero=False)
        _check_number("dropout", self.dropout, allow_zero=True)
        if self.dropout >= 1:
            raise ValueError(f"dropout must be less than 1, got {self.dropout}")
        _check_number("unembed_init_std", self.unembed_init_std, allow_zero=True)
        for name in ("init_std", "embed_init_std", "residual_init_scale"):
            if getattr(self, name) is not None:
                _check_number(name, getattr(self, name), allow_zero=True)
        check_variant(self.variant)
        self._check_shape()

    def _check_shape(self) -> None:
        if self.d_model % self.n_attn_heads != 0:
            raise ValueError(
                f"d_model must be a multiple of n_attn_heads, got d_model={self.d_model}, "
                f"n_attn_heads={self.n_attn_heads}"
            )
        if self.head_dim % 2 != 0:
            raise ValueError(
                f"d_model / n_attn_heads must be even, because rotary embeddings rotate pairs, got {self.head_dim}"
            )
        if self.n_attn_heads % self.kv_heads != 0:
            raise ValueError(
                f"n_attn_heads must be a multiple of n_kv_heads, got n_attn_heads={self.n_attn_heads}, "
                f"n_kv_heads={self.n_kv_heads}"
            )
        if self.n_trunk_layers < 0:
            raise ValueError(
                f"n_layers counts the layers of trunk and heads together, so it must be at least {self.n_head_layers} "
                f"for variant {self.variant!r}, got n_layers={self.n_layers}, n_future={self.n_future}"
            )

    @classmethod
    def preset(
        cls, name: str, vocab_size: int, n_future: int = 4, variant: str = "parallel", **overrides: Any
    ) -> MTPConfig:
        """Returns the configuration of a model of the paper (appendix M) by name: "1M", "3M", ... "13B".

        Args:
            name: One of :data:`mtp_ext.nn.config.PRESETS`.
            vocab_size, n_future, variant: As in the constructor.
            overrides: Any other field, including those of the shape.
        Raises:
            ValueError: Unknown preset.
            TypeError: Unknown field.
        """
        if name not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}")
        fields = PRESETS[name]._asdict() | {"vocab_size": vocab_size, "n_future": n_future, "variant": variant}
        return cls(**(fields | overrides))

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> MTPConfig:
        """Inverts :meth:`to_dict`; missing fields take their defaults.

        Raises:
            ValueError: An unknown field, or a missing one without a default.
        """
        known = {f.name: f for f in dataclasses.fields(cls)}
        if unknown := [name for name in fields if name not in known]:
            raise ValueError(f"unknown model configuration field {unknown[0]!r}; known are {', '.join(known)}")
        required = [name for name, f in known.items() if f.default is dataclasses.MISSING]
        if missing := [name for name in required if name not in fields]:
            raise ValueError(f"model configuration lacks the field {missing[0]!r}")
        return cls(**fields)

    def to_dict(self) -> dict[str, Any]:
        """Returns all fields as plain values (``None`` means the default)."""
        return dataclasses.asdict(self)

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.d_model // self.n_attn_heads

    @property
    def kv_heads(self) -> int:
        """Number of key-value heads, with the default filled in."""
        return self.n_attn_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def ff_dim(self) -> int:
        """Inner width of the SwiGLU, with the default filled in."""
        if self.d_ff is not None:
            return self.d_ff
        return math.ceil(8 * self.d_model / 3 / _FEED_FORWARD_MULTIPLE) * _FEED_FORWARD_MULTIPLE

    @property
    def traits(self) -> Variant:
        """The variant's entry in :data:`VARIANTS`."""
        return VARIANTS[self.variant]

    @property
    def n_head_layers(self) -> int:
        """Total transformer layers of the heads."""
        return self.traits.n_layers(self.n_future)

    @property
    def n_trunk_layers(self) -> int:
        """Transformer layers of the trunk: ``n_layers`` minus those of the heads."""
        return self.n_layers - self.n_head_layers

    @property
    def path_layers(self) -> int:
        """Transformer layers between the tokens and the logits of the head furthest from the trunk."""
        on_path = min(1, self.n_head_layers) if self.traits.order == "independent" else self.n_head_layers
        return self.n_trunk_layers + on_path

    @property
    def one_final_norm(self) -> bool:
        """True if all heads share the final norm."""
        return self.shared_final_norm or self.traits.one_norm

    @property
    def replicates(self) -> bool:
        """True if each head has its own unembedding."""
        return self.replicate_unembedding or self.traits.own_unembedding

    @property
    def n_unembeddings(self) -> int:
        """1 if the heads share the unembedding, else ``n_future``."""
        return self.n_future if self.replicates else 1

    @property
    def _layer_matrices(self) -> int:
        """Number of parameters in a transformer layer's matrices."""
        return self.d_model * ((2 * self.n_attn_heads + 2 * self.kv_heads) * self.head_dim + 3 * self.ff_dim)

    def parameter_counts(self) -> dict[str, int]:
        """Counts the parameters of ``embed``, ``trunk``, ``heads``, ``unembed`` (without tied ones) and ``total``."""
        width = self.d_model
        layer = self._layer_matrices + 2 * width
        kind = self.traits.layer
        own = kind.count(self.n_future) * (kind.blocks * layer + kind.matrices * width * width + kind.vectors * width)
        counts = {
            "embed": self.vocab_size * width,
            "trunk": self.n_trunk_layers * layer,
            "heads": own + width * (1 if self.one_final_norm else self.n_future),
            "unembed": (self.n_unembeddings - self.tie_embeddings) * self.vocab_size * width,
        }
        return counts | {"total": sum(counts.values())}

    def forward_flops(self, seq_len: int) -> dict[str, float]:
        """Forward FLOPs per token of ``trunk``, ``heads``, ``unembed`` and ``total``.

        A multiply-add counts as two. Only matrix products count, not norms, rotations or softmax. Training takes three
        times as many (each product has two in its backward).

        Args:
            seq_len: ``S``; a token attends to ``(S + 1) / 2`` tokens on average.
        """
        width, attention = self.d_model, self.n_attn_heads * self.head_dim
        layer = 2.0 * self._layer_matrices + 4.0 * attention * (seq_len + 1) / 2
        kind = self.traits.layer
        own = kind.count(self.n_future) * (kind.blocks * layer + 2.0 * kind.matrices * width * width)
        rows = 1 if self.traits.one_norm and not self.replicates else self.n_future
        flops = {
            "trunk": self.n_trunk_layers * layer,
            "heads": own,
            "unembed": 2.0 * rows * self.vocab_size * width,
        }
        return flops | {"total": sum(flops.values())}


def _check_count(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    if value >= 2**63:
        raise ValueError(f"{name} must fit in 64 bits, got {value}")


def _check_number(name: str, value: object, *, allow_zero: bool) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not math.isfinite(value) or value < 0 or (value == 0 and not allow_zero):
        raise ValueError(f"{name} must be finite and {'not negative' if allow_zero else 'positive'}, got {value}")
