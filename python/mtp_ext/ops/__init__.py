"""Fused losses. Only the wrapped functions are public: the raw operators have no gradient."""

import torch

import mtp_ext.ops.loss.flops  # noqa: F401  (registers the FLOP formulas)
from mtp_ext.ops.common.result import MultiTokenLoss
from mtp_ext.ops.common.runtime import debug_checks
from mtp_ext.ops.common.workspace import release_workspace
from mtp_ext.ops.count_targets import count_targets
from mtp_ext.ops.document_ids import document_ids
from mtp_ext.ops.linear_cross_entropy import linear_cross_entropy
from mtp_ext.ops.loss.options import RowOptions
from mtp_ext.ops.multi_token_cross_entropy import multi_token_cross_entropy

torch.serialization.add_safe_globals([MultiTokenLoss, RowOptions])  # torch.load takes them as they are

__all__ = [
    "MultiTokenLoss",
    "RowOptions",
    "count_targets",
    "debug_checks",
    "document_ids",
    "linear_cross_entropy",
    "multi_token_cross_entropy",
    "release_workspace",
]
