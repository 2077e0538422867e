"""No tensor of the size of the logits is ever allocated, and heads add no more than their parameters to the peak."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from mtp_ext import _C
from mtp_ext.nn import MTPConfig, MTPModel
from mtp_ext.ops.common.backend import has_fast_bfloat16_gemm
from tests.support import forked
from tests.support.largest_tensor import LargestTensor

Make = Callable[..., Any]


@pytest.mark.parametrize("schedule", ["sequential", "joint", "autograd"])
@pytest.mark.parametrize("n_future", [1, 8])
def test_logits_are_never_whole(n_future: int, schedule: str, make_model: Make, make_batch: Make) -> None:
    batch, seq_len, vocab_size = 3, 400, 2000
    model = make_model(n_future, vocab_size=vocab_size, dtype=torch.float32)
    tokens, labels = make_batch(n_future, batch, seq_len, vocab_size)
    _C.release_workspace()
    with LargestTensor() as seen:
        model(tokens, labels, schedule=schedule).loss.backward()
    if schedule == "autograd":
        assert seen.numel >= batch * seq_len * vocab_size, "the detector is blind"
    else:
        assert seen.numel < batch * seq_len * vocab_size
        # The chunk of logits is the largest thing, and its size does not grow with the number of heads.
        assert seen.numel <= 1024 * vocab_size
        assert 0 < _C.release_workspace() <= 1024 * vocab_size * 4


@pytest.mark.parametrize("n_future", [1, 8])
def test_a_given_workspace_bounds_every_tensor(n_future: int, make_model: Make, make_batch: Make) -> None:
    model = make_model(n_future, vocab_size=2000, dtype=torch.float32)
    tokens, labels = make_batch(n_future, 2, 300, 2000)
    _C.release_workspace()
    with LargestTensor() as seen:
        model(tokens, labels, chunk_rows=50).loss.backward()
    assert seen.numel <= 50 * 2000 and _C.release_workspace() == 50 * 2000 * 4


def measure_step(n_future: int, schedule: str) -> dict[str, int]:
    """Bytes of resident memory that one training step adds to the peak; for a fresh process."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = MTPConfig(vocab_size=32000, d_model=32, n_layers=2 + n_future, n_attn_heads=2, n_future=n_future)
    model = MTPModel(config)
    labels = torch.randint(config.vocab_size, (2, 640 + n_future))
    before = forked.peak_bytes()
    model(labels[:, :640], labels, schedule=schedule).loss.backward()
    return {"step": forked.peak_bytes() - before, "heads": config.parameter_counts()["heads"] * 4}


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the high-water mark from /proc")
def test_eight_heads_peak_like_one_but_for_their_gradients() -> None:
    """Resident memory, of the step alone: what the process held before it would hide a growth."""
    one, eight = (forked.call(measure_step, n, "sequential") for n in (1, 8))
    assert one["step"] > 80 << 20, "the step is too small to measure"
    # The parameters of the heads were there before the step; a gradient of the same size comes in it.
    assert eight["step"] <= 1.1 * one["step"] + eight["heads"] - one["heads"]


def allocated_peak(model: MTPModel, tokens: Tensor, labels: Tensor) -> int:
    """Most bytes of tensors alive at once in a training step, beyond those alive before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        model(tokens, labels).loss.backward()
    alive = peak = 0
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            alive += event.nbytes()
            peak = max(peak, alive)
    return peak


def test_tensors_alive_do_not_grow_with_the_heads(make_model: Make, make_batch: Make) -> None:
    """Exact, unlike resident memory: activations are those of one head; gradients and bookkeeping are what is added."""
    peaks = {}
    for n_future in (1, 8):
        model = make_model(n_future, vocab_size=500, dtype=torch.float32)
        tokens, labels = make_batch(n_future, 2, 600, 500)
        model(tokens, labels).loss.backward()
        model.zero_grad()
        heads = 4 * model.config.parameter_counts()["heads"]
        tables = n_future * tokens.numel() * 64  # a row's index, loss, log-sum-exp, prediction and the like
        peaks[n_future] = allocated_peak(model, tokens, labels) - heads - tables
    assert peaks[8] <= peaks[1]


def bytes_of_document_lengths(layouts: int) -> int:
    """Resident bytes that steps with ``layouts`` lengths of documents add to the first; for a fresh process."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = MTPModel(MTPConfig(vocab_size=100, d_model=64, n_layers=3, n_attn_heads=1, n_future=2))
    tokens = torch.randint(100, (1, 512))

    def step(first: int) -> None:
        documents = (torch.arange(512) >= first).long()[None]
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(tokens, tokens, document_ids=documents).loss
        loss.backward()

    step(100)
    before = forked.peak_bytes()
    for i in range(layouts):
        step(101 + 3 * i)
    return forked.peak_bytes() - before


@pytest.mark.slow
@pytest.mark.skipif(not has_fast_bfloat16_gemm(), reason="only bfloat16 GEMMs are compiled for each shape")
def test_each_length_of_documents_compiles_no_gemms() -> None:
    grown = forked.call(bytes_of_document_lengths, 60)  # 567 MiB where each length is a shape of its own
    assert grown < 96 << 20, f"{grown >> 20} MiB"
