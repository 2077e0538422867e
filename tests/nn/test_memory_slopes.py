"""How a step's memory grows with the number of heads, in bytes of live tensors: exact, so that no slope comes back.

What each head costs beside its parameters and gradients: nothing where heads are independent, ``B S D`` where chained
heads run again, one layer's activations where they are kept; and ``B S V`` or more with plain torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from mtp_ext.nn import MTPModel
from mtp_ext.nn.schedules.head_stack import head_outputs
from tests.nn.conftest import ALL_VARIANTS

pytestmark = pytest.mark.slow
Make = Callable[..., Any]
BATCH, SEQ_LEN, WIDTH, VOCAB_SIZE = 2, 600, 16, 500
ROW_BYTES = 24  # a row's index, loss, log-sum-exp and prediction
STATE_BYTES = BATCH * SEQ_LEN * WIDTH * 4
LOGIT_BYTES = BATCH * SEQ_LEN * VOCAB_SIZE * 4


def live_peak(model: MTPModel, tokens: Tensor, labels: Tensor, schedule: str) -> int:
    """Most bytes of tensors alive at once in a training step, beyond those alive before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        model(tokens, labels, schedule=schedule).loss.backward()
    alive = peak = 0
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            alive += event.nbytes()
            peak = max(peak, alive)
    return peak


def slope(make_model: Make, make_batch: Make, variant: str, schedule: str, recompute: bool = False) -> float:
    """Bytes per head between 2 and 8 heads, without the gradients of the heads' parameters and the rows' tables."""
    peaks = {}
    for n in (2, 8):
        model = make_model(n, variant=variant, vocab_size=VOCAB_SIZE, dtype=torch.float32)
        model.heads.recompute = recompute
        tokens, labels = make_batch(n, BATCH, SEQ_LEN, VOCAB_SIZE)
        model(tokens, labels, schedule=schedule).loss.backward()
        model.zero_grad()
        counts = model.config.parameter_counts()
        known = 4 * (counts["heads"] + counts["unembed"]) + n * BATCH * SEQ_LEN * ROW_BYTES
        peaks[n] = live_peak(model, tokens, labels, schedule) - known
    return (peaks[8] - peaks[2]) / 6


def activation_bytes(model: MTPModel, tokens: Tensor) -> int:
    """What one more head of a chain saves for its backward."""
    saved: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    ahead = F.pad(tokens, (0, model.config.n_future - 1))
    context = model.with_tokens_ahead(model.prepare(tokens, None), ahead)
    hidden = model.trunk(tokens, context=context).detach().requires_grad_()
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        outputs = head_outputs(model.heads, hidden, context)
    total = sum(size for pointer, size in saved.items() if pointer not in own)
    assert len(outputs) == 8
    return total // sum(model.heads.head(k).block is not None for k in outputs)


@pytest.mark.parametrize("variant", ["parallel", "linear", "replicated", "shared"])
def test_independent_heads_are_flat(variant: str, make_model: Make, make_batch: Make) -> None:
    assert slope(make_model, make_batch, variant, "sequential") <= 0.02 * STATE_BYTES


@pytest.mark.parametrize("variant", ["causal", "anticausal", "sequential_modules"])
def test_chained_heads_that_run_again_keep_their_inputs(variant: str, make_model: Make, make_batch: Make) -> None:
    assert slope(make_model, make_batch, variant, "sequential", recompute=True) <= 1.05 * STATE_BYTES


@pytest.mark.parametrize("variant", ["causal", "anticausal", "sequential_modules"])
def test_chained_heads_keep_the_activations_of_a_layer(variant: str, make_model: Make, make_batch: Make) -> None:
    model = make_model(8, variant=variant, vocab_size=VOCAB_SIZE, dtype=torch.float32)
    layer = activation_bytes(model, make_batch(8, BATCH, SEQ_LEN, VOCAB_SIZE)[0])
    grown = slope(make_model, make_batch, variant, "sequential")
    # Beside what autograd saves, the normed output waits for its loss.
    assert 3 * STATE_BYTES < grown <= 1.02 * layer + STATE_BYTES, (
        "more than a layer's activations, or the measure is blind"
    )
    assert grown < 0.7 * LOGIT_BYTES


@pytest.mark.parametrize("variant", ALL_VARIANTS)
def test_plain_torch_keeps_the_logits_of_every_head(variant: str, make_model: Make, make_batch: Make) -> None:
    """The slope that the others are free of: the measure sees it."""
    assert slope(make_model, make_batch, variant, "autograd") >= LOGIT_BYTES
