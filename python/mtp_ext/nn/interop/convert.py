"""Converts a model between equivalent architectures."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from mtp_ext.nn.config import MTPConfig
from mtp_ext.nn.model import MTPModel

_BY_LAYERS = ("parallel", "causal", "anticausal")


def convert(
    model: MTPModel,
    *,
    variant: str | None = None,
    replicate_unembedding: bool | None = None,
    shared_final_norm: bool | None = None,
) -> MTPModel:
    """Returns a model of an equivalent architecture that computes the same function, with copies of the weights.

    - A shared unembedding becomes ``n`` equal ones (``replicate_unembedding=True``), and back if they are equal; so
      does a shared final norm (``shared_final_norm=False``).
    - "shared" becomes "replicated" with equal copies of unembedding and norm, and back if they are equal.
    - With one head, "parallel", "causal" and "anticausal" are the same architecture, and so are "replicated", "shared"
      and "sequential_modules".

    Args:
        model: The model; not modified.
        variant: The architecture to convert to; default the model's own.
        replicate_unembedding: Whether each head gets its own unembedding; default as in the model, if the variant
            leaves a choice.
        shared_final_norm: Whether the heads share the final norm; default likewise.
    Returns:
        A new model with the dtype, device and mode of ``model``.
    Raises:
        ValueError: The architectures are not equivalent, or weights that must be equal are not.
    """
    config = model.config
    variant = config.variant if variant is None else variant
    if replicate_unembedding is None:
        replicate_unembedding = config.replicate_unembedding
    if shared_final_norm is None:
        shared_final_norm = config.shared_final_norm
    target = dataclasses.replace(
        config,
        variant=variant,
        replicate_unembedding=replicate_unembedding,
        shared_final_norm=shared_final_norm,
    )
    if variant == "replicated":  # always replicates: keep one form of the configuration
        target = dataclasses.replace(target, replicate_unembedding=False)
    _check_equivalent(config, target)
    state = {name: value.detach().clone() for name, value in model.state_dict().items()}
    _convert_norms(state, config, target)
    _convert_unembedding(state, config, target)
    return build_like(model, target, state)


def build_like(model: MTPModel, config: MTPConfig, state: dict[str, Tensor]) -> MTPModel:
    """Builds a model of ``config`` with weights ``state`` and the dtype, device and mode of ``model``."""
    weight = model.embed.weight
    with torch.random.fork_rng(devices=[]):  # the initial weights are discarded: leave the caller's RNG alone
        built = MTPModel(config).to(weight.device, weight.dtype)
    built.load_state_dict(state)
    return built.train(model.training)


def _check_equivalent(config: MTPConfig, target: MTPConfig) -> None:
    if config.variant == target.variant:
        return
    pair = {config.variant, target.variant}
    bare = {"replicated", "shared"} | ({"sequential_modules"} if config.n_future == 1 else set())
    if pair <= bare or (config.n_future == 1 and pair <= set(_BY_LAYERS)):
        return
    raise ValueError(
        f"variant must be equivalent to {config.variant!r} with n_future={config.n_future}, got {target.variant!r}, "
        "whose heads compute something else"
    )


def _convert_norms(state: dict[str, Tensor], config: MTPConfig, target: MTPConfig) -> None:
    if config.one_final_norm == target.one_final_norm:
        return
    own = [f"heads.{k}.norm.weight" for k in range(config.n_future)]
    if target.one_final_norm:
        state["heads.norm.weight"] = _one_of([state.pop(name) for name in own], "final norms")
    else:
        norm = state.pop("heads.norm.weight")
        state.update({name: norm.clone() for name in own})


def _convert_unembedding(state: dict[str, Tensor], config: MTPConfig, target: MTPConfig) -> None:
    """Converts ``unembed.weight`` between ``[V, D]`` and ``[n, V, D]`` (without head 1's if tied)."""
    if config.replicates == target.replicates:
        return
    weight = state["unembed.weight"]
    if target.replicates:
        state["unembed.weight"] = weight.expand(config.n_future - config.tie_embeddings, *weight.shape).clone()
        return
    matrices = [*([state["embed.weight"]] if config.tie_embeddings else []), *weight]
    state["unembed.weight"] = _one_of(matrices, "unembeddings")


def _one_of(copies: list[Tensor], name: str) -> Tensor:
    for k, copy in enumerate(copies[1:], 2):
        if not torch.equal(copy, copies[0]):
            raise ValueError(f"model must have equal {name} to share one, but that of head {k} is not that of head 1")
    return copies[0].clone()
