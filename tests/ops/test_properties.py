"""Drawn calls against the float64 reference: any shapes, options, dtypes and masks. ``make fuzz`` draws many more."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings

from mtp_ext.ops.loss import native_cpu as fused_cpu
from mtp_ext.ops.loss import plain_call
from tests.support.loss_calls import Call, arguments, assert_no_worse_than_eager, calls, plain_calls


@given(calls())
def test_any_call_is_no_worse_than_eager(call: Call) -> None:
    assert_no_worse_than_eager(call)


@given(calls())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_accumulator_is_no_worse_than_eager(monkeypatch: pytest.MonkeyPatch, call: Call) -> None:
    """What one native call does, a step at a time."""
    monkeypatch.setattr(fused_cpu, "takes", lambda weight, group_name: False)
    assert_no_worse_than_eager(call)


@given(plain_calls())
def test_a_plain_call_is_no_worse_than_eager(call: Call) -> None:
    made = arguments(call, call.dtype, ours=True)
    assert plain_call.takes(**made)
    assert_no_worse_than_eager(call)
