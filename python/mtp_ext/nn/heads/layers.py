"""Factories of head layers that reuse existing modules."""

from __future__ import annotations

from torch import nn

from mtp_ext.nn.config import MTPConfig
from mtp_ext.nn.transformer.layers import Block
from mtp_ext.nn.transformer.linear import Linear


def transformer_layer(config: MTPConfig, layer: int, k: int) -> nn.Module:
    """Makes a transformer layer like the trunk's."""
    return Block(config, layer)


def linear_layer(config: MTPConfig, layer: int, k: int) -> nn.Module:
    """Makes one matrix ``[D, D]``."""
    return Linear(config.d_model, config.d_model)
