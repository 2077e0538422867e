"""Small models and batches for the tests of mtp_ext.nn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mtp_ext.nn import MTPConfig, MTPModel
from mtp_ext.nn.variants import VARIANTS

VOCAB_SIZE = 37
PAPER_VARIANTS = ("parallel", "linear", "replicated", "causal", "anticausal")
ALL_VARIANTS = (*PAPER_VARIANTS, "sequential_modules", "shared")
SCHEDULES = ("sequential", "joint", "autograd")


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """Every test of this folder."""


@pytest.fixture
def make_model() -> Callable[..., MTPModel]:
    """``make_model(n_future=..., **fields)``: two trunk layers, width 16, grouped queries, float64."""

    def make(n_future: int = 4, dtype: torch.dtype = torch.float64, **fields: Any) -> MTPModel:
        n_layers = VARIANTS[fields.get("variant", "parallel")].n_layers(n_future) + 2
        shape = {"vocab_size": VOCAB_SIZE, "d_model": 16, "n_layers": n_layers, "n_attn_heads": 4, "n_kv_heads": 2}
        model = MTPModel(MTPConfig(**(shape | {"d_ff": 24, "n_future": n_future, "unembed_init_std": 1.0} | fields)))
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "norm" in name:
                    p.add_(0.3 * torch.randn_like(p))  # a weight of 1 hides a missing factor
        return model.to(dtype)

    return make


@pytest.fixture
def make_batch() -> Callable[..., tuple[Tensor, Tensor]]:
    """``make_batch(n, B, S)``: ``tokens [B, S]`` and unshifted ``labels [B, S + n]``."""

    def make(n_future: int, batch: int = 2, seq_len: int = 12, vocab_size: int = VOCAB_SIZE) -> tuple[Tensor, Tensor]:
        labels = torch.randint(vocab_size, (batch, seq_len + n_future))
        return labels[:, :seq_len], labels

    return make


@pytest.fixture
def relative_error() -> Callable[[Tensor, Tensor], float]:
    """Largest difference, over the largest expected element."""

    def error(actual: Tensor, expected: Tensor) -> float:
        if expected.numel() == 0 or not expected.any():
            return float(actual.detach().abs().amax()) if actual.numel() else 0.0
        return float((actual - expected).detach().abs().amax() / expected.detach().abs().amax())

    return error
