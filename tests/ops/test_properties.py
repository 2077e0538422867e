"""Drawn calls against the float64 reference: any shapes, options, dtypes and masks. ``make fuzz`` draws many more."""

from __future__ import annotations

from hypothesis import given

from tests.ops.cases import Call, assert_no_worse_than_eager, calls


@given(calls())
def test_any_call_is_no_worse_than_eager(call: Call) -> None:
    assert_no_worse_than_eager(call)
