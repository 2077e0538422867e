"""Drawn calls against the float64 reference: any shapes, options, dtypes and masks. ``make fuzz`` draws many more."""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import given
from hypothesis import strategies as st

from mtp_ext.ops.common.backend import CpuBackend, use_backend
from mtp_ext.ops.loss import plain_call
from tests.support.accuracy import assert_accurate
from tests.support.drawn_calls import calls, plain_calls
from tests.support.loss_calls import Call, arguments


@given(calls())
def test_any_call_is_accurate(call: Call) -> None:
    assert_accurate(call)


@given(calls(), st.booleans())
def test_both_ways_to_hold_16_bit_logits(call: Call, fast_bfloat16: bool) -> None:
    """In bfloat16, as on a processor that multiplies it natively, and in float32, as on one that does not."""
    with use_backend(CpuBackend(fast_bfloat16=fast_bfloat16)):
        assert_accurate(replace(call, dtype=torch.bfloat16))


@given(calls())
def test_the_row_loop_is_accurate(call: Call) -> None:
    """The loop that GPUs and shards run, with the CPU's arithmetic."""
    with use_backend(CpuBackend(native_loss=False)):
        assert_accurate(call)


@given(plain_calls())
def test_a_plain_call_is_accurate(call: Call) -> None:
    made = arguments(call, call.dtype, ours=True)
    assert plain_call.takes(**made)
    assert_accurate(call)
