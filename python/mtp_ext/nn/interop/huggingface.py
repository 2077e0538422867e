"""Hugging Face transformers' causal language models as a trunk, with their unembedding shared by new heads.

Of a model of ``L`` layers, ``L - 1`` are the trunk; the last one, with the final norm, is head 1, so that head 1 stays
the model's own. Heads 2 to ``n`` are new layers of the same class. The given model is not changed and keeps working; it
shares its parameters with the trunk and head 1.

Requires the extra: ``pip install 'mtp_ext[transformers]'``.
"""

from __future__ import annotations

import copy
import importlib
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from mtp_ext.nn.composed import ComposedModel
from mtp_ext.nn.heads.head import Head
from mtp_ext.nn.heads.unembedding import check_linear_map
from mtp_ext.nn.interop.add_heads import INITS
from mtp_ext.nn.transformer.checks import is_watched
from mtp_ext.nn.transformer.kv_cache import KVCache, Slots
from mtp_ext.nn.variants import TRANSFORMER, VARIANTS
from mtp_ext.ops.common.checks import check_token_range

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2")
SUPPORTED = ("parallel", "linear", "causal", "anticausal", "shared")


@dataclass(frozen=True)
class Visibility:
    """Shared by the layers of one forward: positions, and the mask of each kind of attention (None: causal)."""

    position_ids: Tensor  # [1, S], or [B, S] if the rows of a cache differ in length
    masks: dict[str, Tensor | None]
    cache: LayerCaches | None = None


@dataclass(frozen=True)
class LayerCaches:
    """A :class:`KVCache` as the attention layers of transformers call their own.

    Args:
        cache: The cache.
        slots: Where this forward writes.
        layer: The index under which it writes; default the one that a layer has in its model.
    """

    cache: KVCache
    slots: Slots
    layer: int | None = None

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Stores new keys and values ``[B, H_kv, S, head_dim]`` and returns those of all positions so far."""
        layer = layer_idx if self.layer is None else self.layer
        stored = self.cache.write(layer, keys.transpose(1, 2), values.transpose(1, 2), self.slots)
        return stored[0].transpose(1, 2), stored[1].transpose(1, 2)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The length of the longest row."""
        return self.cache.max_length


class HuggingFaceTrunk(nn.Module):
    """A transformers base model without its last layers and its final norm.

    Args:
        model: The causal language model; the trunk shares its parameters.
        n_layers: Layers of the trunk.
    """

    def __init__(self, model: Any, n_layers: int) -> None:
        super().__init__()
        self._borrowed = (model,)  # in a tuple, so that its parameters are not registered twice
        self._taken = _parts(model)
        base = copy.copy(model.model)
        base._modules = dict(base._modules)  # own dict, so that the given model keeps its last layer and norm
        base.layers = nn.ModuleList(list(base.layers)[:n_layers])
        base.norm = nn.Identity()
        self.base = base

    @property
    def language_model(self) -> Any:
        """The given model."""
        return self._borrowed[0]

    def check_parts(self) -> None:
        """Raises ValueError if the given model no longer runs the modules that trunk and head 1 share with it."""
        if _parts(self.language_model) != self._taken:
            raise ValueError(
                "the language model must keep its embedding, layers, norm and lm_head after from_huggingface, but one "
                "was replaced (resize_token_embeddings, LoRA): replace it first, then call from_huggingface again"
            )

    @property
    def max_seq_len(self) -> int | None:
        """The longest sequence that the model's configuration allows."""
        return getattr(self.base.config, "max_position_embeddings", None)

    def context(self, tokens: Tensor, document_ids: Tensor | None, cache: KVCache | None = None) -> Visibility:
        """Checks the inputs of a forward and builds positions and masks.

        Args:
            tokens: ``[B, S]``.
            document_ids: ``[B, S]``: attention stays within tokens of one id.
            cache: Tokens follow those that it holds.
        """
        self.check_parts()
        check_token_range("tokens", tokens, self.base.embed_tokens.num_embeddings)
        config, caches = self.base.config, None
        positions, n_keys = torch.arange(tokens.shape[1], device=tokens.device)[None], tokens.shape[1]
        if cache is not None:
            slots = cache.slots(n_keys, tokens.device)
            positions, n_keys, caches = slots.positions.view(-1, n_keys), slots.end, LayerCaches(cache, slots)
        window = getattr(config, "sliding_window", None)
        kinds = {"full_attention": None}
        if window is not None:
            kinds["sliding_attention"] = window
        needed = document_ids is not None or cache is not None  # transformers would ask its own cache for sizes
        masks = {
            kind: self._mask(positions, n_keys, document_ids, limit, always=needed) for kind, limit in kinds.items()
        }
        return Visibility(positions, masks, caches)

    def _mask(
        self, positions: Tensor, n_keys: int, document_ids: Tensor | None, window: int | None, *, always: bool
    ) -> Tensor | None:
        """Returns a mask ``[B or 1, 1, S, L]``: additive for eager attention, else boolean; None: causal.

        ``always`` refuses to return None.
        """
        attention = self.base.config._attn_implementation
        narrow = window is not None and window < n_keys
        if not always and not narrow and attention != "eager":
            return None
        if attention not in ("eager", "sdpa"):
            raise ValueError(
                "document_ids, sliding windows and decoding need a model with attn_implementation='sdpa' or 'eager', "
                f"got {attention!r}"
            )
        key = torch.arange(n_keys, device=positions.device)
        seen = positions[..., None] >= key
        if window is not None:
            seen &= positions[..., None] - key < window
        seen = seen[:, None]
        if document_ids is not None:
            seen = seen & (document_ids[:, None, :, None] == document_ids[:, None, None, :])
        if attention == "sdpa":
            return seen
        dtype = self.base.embed_tokens.weight.dtype
        return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min)

    def forward(self, tokens: Tensor, context: Visibility) -> Tensor:
        """Maps tokens ``[B, S] -> [B, S, D]``, without the final norm."""
        mask: Any = context.masks
        if getattr(self.base.config, "layer_types", None) is None:  # one kind of attention in all layers
            mask = mask[_kind(self.base.config, 0)]
        output = self.base(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=context.position_ids,
            past_key_values=context.cache,
            use_cache=context.cache is not None,
        )
        hidden: Tensor = output.last_hidden_state
        return hidden


class HuggingFaceLayer(nn.Module):
    """A decoder layer of transformers as a head's layer.

    Args:
        layer: The layer.
        rotary: The model's rotary embedding; owned by the model.
        kind: The kind of its attention, "full_attention" or "sliding_attention".
        index: Its index in the key-value cache.
    """

    def __init__(self, layer: nn.Module, rotary: nn.Module, kind: str, index: int) -> None:
        super().__init__()
        self.layer, self.kind, self.index = layer, kind, index
        self._borrowed = (rotary,)

    def forward(self, x: Tensor, context: Visibility) -> Tensor:
        """Maps ``[B, S, D] -> [B, S, D]``."""
        y: Tensor = self.layer(
            x,
            attention_mask=context.masks[self.kind],
            position_ids=context.position_ids,
            position_embeddings=self._borrowed[0](x, context.position_ids),
            past_key_values=None if context.cache is None else replace(context.cache, layer=self.index),
        )
        return y


def from_huggingface(
    model: Any, n_future: int, variant: str = "parallel", init: str = "copy_last_layer"
) -> ComposedModel:
    """Builds ``n_future`` heads on a transformers causal LM (Llama, Mistral, Qwen2, Qwen3, Gemma, Gemma 2).

    Head 1's logits are those of ``model``, including its soft cap, except in the anticausal variant, where head 1 reads
    the new heads. To train only the new heads, freeze the model: ``model.requires_grad_(False)``, before or after.

    Args:
        model: From ``AutoModelForCausalLM.from_pretrained``; its parameters are shared, not copied.
        n_future: ``n``.
        variant: "parallel", "causal" or "anticausal": new heads are layers of the model's class. "linear": new heads
            are matrices on top of all layers. "shared": adds no parameters.
        init: "copy_last_layer" (linear heads: the identity), or "random" from torch's global generator, with the
            standard deviation ``model.config.initializer_range``.
    Returns:
        A :class:`mtp_ext.nn.ComposedModel`; ``result.trunk.language_model`` is ``model``.
    Raises:
        ImportError: transformers is not installed.
        TypeError, ValueError: A wrong argument, or an unsupported family.
    """
    _check_model(model)
    if variant not in SUPPORTED:
        raise ValueError(f"variant must be one of {', '.join(SUPPORTED)} here, got {variant!r}")
    if init not in INITS:
        raise ValueError(f"init must be one of {', '.join(INITS)}, got {init!r}")
    if isinstance(n_future, bool) or not isinstance(n_future, int) or n_future < 1:
        raise ValueError(f"n_future must be an int of at least 1, got {n_future!r}")
    config, base = model.config, model.model
    trunk = HuggingFaceTrunk(model, len(base.layers) - (VARIANTS[variant].layer == TRANSFORMER))
    heads = [_make_head(model, k, variant, init) for k in range(1, n_future + 1)]
    softcap = getattr(config, "final_logit_softcapping", None)
    return ComposedModel(trunk, heads, model.lm_head, variant=variant, softcap=softcap)


def _make_head(model: Any, k: int, variant: str, init: str) -> Head:
    """Makes head ``k``: head 1 is the model's own; the others are copies of it, or new."""
    config, base, own = model.config, model.model, k == 1
    norm = base.norm if own else copy.deepcopy(base.norm).requires_grad_(True)
    if variant == "shared":
        return Head(None, base.norm)
    if variant == "linear":
        return Head(None if own else _linear(base.norm.weight, config, init), norm)
    last = base.layers[-1]
    if own:
        layer = last
    elif init == "copy_last_layer":
        layer = copy.deepcopy(last).requires_grad_(True)
    else:
        layer = _random_layer(last, config)
    n_before = len(base.layers) - 1
    return Head(HuggingFaceLayer(layer, base.rotary_emb, _kind(config, n_before), n_before + k - 1), norm)


def _linear(like: Tensor, config: Any, init: str) -> nn.Linear:
    layer = nn.Linear(config.hidden_size, config.hidden_size, bias=False, device=like.device, dtype=like.dtype)
    if init == "copy_last_layer":
        nn.init.eye_(layer.weight)
    else:
        nn.init.normal_(layer.weight, std=config.initializer_range)
    return layer


def _random_layer(last: nn.Module, config: Any) -> nn.Module:
    """Makes a randomly initialised layer of the class of ``last``."""
    index = len(config.layer_types) - 1 if getattr(config, "layer_types", None) else config.num_hidden_layers - 1
    make: Any = type(last)
    layer: nn.Module = make(config, index)
    for module in layer.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=config.initializer_range)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    like = next(last.parameters())
    return layer.to(like.device, like.dtype).train(last.training)


def _kind(config: Any, layer: int) -> str:
    """The kind of attention of a layer; without layer types, a sliding window applies to all layers."""
    types = getattr(config, "layer_types", None)
    if types is not None:
        return str(types[layer])
    return "full_attention" if getattr(config, "sliding_window", None) is None else "sliding_attention"


def _parts(model: Any) -> tuple[nn.Module, ...]:
    """Returns the modules of a language model that trunk and head 1 take."""
    return (model.lm_head, model.model.embed_tokens, model.model.norm, *model.model.layers)


def trunk_of(model: ComposedModel) -> HuggingFaceTrunk:
    """Returns the trunk of a model from :func:`from_huggingface`; raises TypeError for another."""
    if not isinstance(model.trunk, HuggingFaceTrunk):
        raise TypeError(f"model must come from from_huggingface, got a trunk of type {type(model.trunk).__name__}")
    return model.trunk


def _check_model(model: Any) -> None:
    if not isinstance(model, transformers().PreTrainedModel):
        raise TypeError(f"model must be a causal language model of transformers, got {type(model).__name__}")
    family = model.config.model_type
    if family not in FAMILIES or not hasattr(model, "lm_head"):
        raise ValueError(
            f"model must be a causal language model of one of the families {', '.join(FAMILIES)}, got "
            f"{type(model).__name__} ({family})"
        )
    check_linear_map(model.lm_head)
    if is_watched(model.model):
        raise ValueError(
            "model.model must have its own forward and no hooks, because the trunk runs a copy of it: remove them, or "
            "compile the result of from_huggingface instead"
        )


def transformers() -> Any:
    """Imports transformers; raises ImportError that says how to install it."""
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise ImportError(
            "Hugging Face models need the package transformers: pip install 'mtp_ext[transformers]'"
        ) from error
