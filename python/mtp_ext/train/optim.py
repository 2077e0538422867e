"""The optimisers of a run behind one interface: parameter assignment, one learning-rate factor, one state."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mtp_ext.distributed.clip import clip_grad_norm_
from mtp_ext.distributed.whole_state import shard_like, whole_state
from mtp_ext.train.config import OptimConfig
from mtp_ext.train.muon import Muon

# Matrices that look up or score tokens: each row belongs to one token, so Muon's orthogonalisation does not apply.
TOKEN_MATRICES = ("embed.", "unembed.")


class Optimizers:
    """AdamW for all parameters, or Muon for the layers' matrices and AdamW for the rest.

    Weight decay is decoupled and does not apply to vectors (norms). The state is a list of the optimisers' states.

    Args:
        model: The model whose parameters are optimised; tied ones once.
        config: The optimiser, peak learning rates, decay and clipping.
    """

    def __init__(self, model: nn.Module, config: OptimConfig) -> None:
        self._clip_norm = config.clip_norm
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        layers, tokens, vectors = _sort_parameters(model)
        use_muon = config.name == "muon" and bool(layers)
        groups = [
            {"params": tokens if use_muon else layers + tokens, "weight_decay": config.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        self._optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(
                [g for g in groups if g["params"]], lr=config.lr, betas=(config.beta1, config.beta2), fused=True
            )
        ]
        if use_muon:
            muon = Muon(layers, lr=config.muon_lr, momentum=config.momentum, weight_decay=config.weight_decay)
            self._optimizers.append(muon)
        self._peaks = [[g["lr"] for g in o.param_groups] for o in self._optimizers]
        self.updates = 0

    def clip_gradients(self) -> Tensor:
        """Clips the norm of the whole gradient; returns the norm before clipping, 0-d."""
        limit = self._clip_norm if self._clip_norm > 0 else math.inf
        return clip_grad_norm_(self._parameters, limit)

    def step(self, factor: float) -> None:
        """Updates at ``factor`` times the peak learning rates, then frees the gradients."""
        self.updates += 1
        for optimizer, peaks in zip(self._optimizers, self._peaks, strict=True):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = factor * peak
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def tensors(self) -> list[Any]:
        """Returns the values of every parameter's state, tensors and others."""
        return [x for o in self._optimizers for state in o.state.values() for x in state.values()]

    def state_dict(self) -> list[dict[str, Any]]:
        """Returns the state of every optimiser, whole where parameters are sharded; all processes call it together."""
        return [whole_state(optimizer.state_dict()) for optimizer in self._optimizers]

    def load_state_dict(self, states: list[Mapping[str, Any]]) -> None:
        """Restores the moments from ``states``; learning rates and decay stay those of the configuration."""
        for optimizer, state in zip(self._optimizers, states, strict=True):
            own = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
            optimizer.load_state_dict(_sharded(state, optimizer))
            for group, settings in zip(optimizer.param_groups, own, strict=True):
                group.update(settings)


def _sharded(state: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Returns an optimiser's whole state with the tensors of a parameter's shape placed as the parameter is."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    values = {
        i: {k: shard_like(v, parameters[i]) if _has_shape(v, parameters[i]) else v for k, v in of_parameter.items()}
        for i, of_parameter in state["state"].items()
    }
    return {**state, "state": values}


def _has_shape(value: Any, parameter: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == parameter.shape


def _sort_parameters(model: nn.Module) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Splits the trainable parameters into layer matrices, vocabulary matrices and vectors."""
    layers: list[Tensor] = []
    tokens: list[Tensor] = []
    vectors: list[Tensor] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.ndim < 2:
            vectors.append(parameter)
        elif parameter.ndim > 2 or name.startswith(TOKEN_MATRICES):
            tokens.append(parameter)
        else:
            layers.append(parameter)
    return layers, tokens, vectors
