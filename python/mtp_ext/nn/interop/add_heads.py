"""Adds heads to a trained one-head language model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from mtp_ext.nn.config import MTPConfig
from mtp_ext.nn.interop.convert import build_like
from mtp_ext.nn.model import MTPModel
from mtp_ext.nn.variants import DEEPSEEK_MODULE, LINEAR, NO_LAYER, TRANSFORMER, VARIANTS, check_variant

INITS = ("copy_last_layer", "random")
State = dict[str, Tensor]


def add_heads(model: MTPModel, n_future: int, variant: str = "parallel", init: str = "copy_last_layer") -> MTPModel:
    """Returns a model with ``n_future`` heads whose head 1 is the given model.

    The model's last layer becomes head 1 and the others the trunk; if heads have no transformer layers, the last one
    stays in the trunk. Embedding, unembedding, layers and norms are copies. Head 1's logits are those of ``model``,
    except in the anticausal variant, where head 1 reads the new heads.

    Args:
        model: A model with one head; not modified.
        n_future: ``n``, at least 2.
        variant: Architecture of the result. The new heads' transformer layers are added to the model's.
        init: Initial weights of the new heads. "copy_last_layer": copies of head 1's layer, norm and (if each head has
            one) unembedding; the identity for linear heads. "random": those of a new model, from torch's global
            generator.
    Returns:
        A new model with the dtype, device and mode of ``model``.
    Raises:
        ValueError: ``model`` has several heads or a linear one, or another argument is out of range.
    """
    check_variant(variant)
    if init not in INITS:
        raise ValueError(f"init must be one of {', '.join(INITS)}, got {init!r}")
    config = model.config
    if config.n_future != 1:
        raise ValueError(f"model must have one head, got n_future={config.n_future}")
    if config.traits.layer == LINEAR:
        raise ValueError("model must not have a linear head: add heads to the model that the head belongs to")
    if isinstance(n_future, bool) or not isinstance(n_future, int) or n_future < 2:
        raise ValueError(f"n_future must be an int of at least 2, got {n_future!r}")
    added = VARIANTS[variant].n_layers(n_future) - VARIANTS[variant].n_layers(1)
    target = dataclasses.replace(config, n_future=n_future, variant=variant, n_layers=config.n_layers + added)
    fresh = MTPModel(target).state_dict()
    own = {name: value.detach().to("cpu") for name, value in model.state_dict().items()}
    state = _grown(own, config, target, fresh, copies=init == "copy_last_layer")
    return build_like(model, target, state)


def _grown(own: State, config: MTPConfig, target: MTPConfig, fresh: State, *, copies: bool) -> State:
    """Returns the state of ``target``: the model's weights, and copies or ``fresh`` values for the new heads."""
    state = dict(fresh)
    state["embed.weight"] = own["embed.weight"]
    layers = _layers(own, config)
    for i in range(target.n_trunk_layers):
        state.update(_named(f"trunk.layers.{i}.", layers[i]))
    norm = own["heads.norm.weight"] if config.one_final_norm else own["heads.0.norm.weight"]
    if target.one_final_norm:
        state["heads.norm.weight"] = norm
    for k in range(target.n_future if copies else 1):
        if not target.one_final_norm:
            state[f"heads.{k}.norm.weight"] = norm
        state.update(_head_like_the_first(k, target, layers[-1]))
    state["unembed.weight"] = _unembedding(own, config, target, fresh["unembed.weight"], copies=copies)
    return state


def _layers(own: State, config: MTPConfig) -> list[State]:
    """Returns the transformer layers of a model with one head, in order."""
    prefixes = [f"trunk.layers.{i}." for i in range(config.n_trunk_layers)]
    if config.traits.layer == TRANSFORMER:
        prefixes.append("heads.0.block.")
    return [{n.removeprefix(p): value for n, value in own.items() if n.startswith(p)} for p in prefixes]


def _head_like_the_first(k: int, target: MTPConfig, last: State) -> State:
    """Returns the layer of head ``k + 1`` that starts as head 1: the model's last layer, or the identity."""
    prefix, layer, width = f"heads.{k}.block.", target.traits.layer, target.d_model
    if layer == TRANSFORMER:
        return _named(prefix, last)
    if layer == LINEAR:
        return {f"{prefix}weight": torch.eye(width)}
    if layer == DEEPSEEK_MODULE:  # head 1 has no module; the others start by ignoring the embedding
        joint = torch.cat([torch.eye(width), torch.zeros(width, width)], dim=1)
        return {f"{prefix}joint.weight": joint, **_named(f"{prefix}block.", last)} if k else {}
    if layer != NO_LAYER:
        raise ValueError(f"variant must have layers that can start as head 1 of a model, got {layer.module}")
    return {}


def _named(prefix: str, tensors: Mapping[str, Tensor]) -> State:
    return {prefix + name: value for name, value in tensors.items()}


def _unembedding(own: State, config: MTPConfig, target: MTPConfig, fresh: Tensor, *, copies: bool) -> Tensor:
    """Returns ``[V, D]``, or all heads' unembeddings, without head 1's if it is tied to the embedding."""
    first = own["embed.weight"] if config.tie_embeddings else own["unembed.weight"]
    first = first.view(fresh.shape[-2:])  # a replicated unembedding is [1, V, D]
    if not target.replicates:
        return first
    rest = first.expand(target.n_future - 1, -1, -1) if copies else fresh[-(target.n_future - 1) :].to(first.dtype)
    return rest if target.tie_embeddings else torch.cat([first[None], rest])
