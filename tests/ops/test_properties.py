"""Drawn calls against the float64 reference: any shapes, options, dtypes and masks. ``make fuzz`` draws many more."""

from __future__ import annotations

from hypothesis import given

from mtp_ext.ops.common.backend import CpuBackend, use_backend
from mtp_ext.ops.loss import plain_call
from tests.support.loss_calls import Call, arguments, assert_no_worse_than_eager, calls, plain_calls


@given(calls())
def test_any_call_is_no_worse_than_eager(call: Call) -> None:
    assert_no_worse_than_eager(call)


@given(calls())
def test_the_row_loop_is_no_worse_than_eager(call: Call) -> None:
    """The loop that GPUs and shards run, with the CPU's arithmetic."""
    with use_backend(CpuBackend(native_loss=False)):
        assert_no_worse_than_eager(call)


@given(plain_calls())
def test_a_plain_call_is_no_worse_than_eager(call: Call) -> None:
    made = arguments(call, call.dtype, ours=True)
    assert plain_call.takes(**made)
    assert_no_worse_than_eager(call)
