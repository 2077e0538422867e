"""A GPU's path, whose row counts no host sees: its arithmetic on the CPU, and its traces with fake CUDA tensors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch._subclasses.fake_tensor import FakeTensorMode

from mtp_ext.ops import linear_cross_entropy, multi_token_cross_entropy
from mtp_ext.ops.common import checks
from mtp_ext.ops.loss import device_rows, row_loop, row_selection
from mtp_ext.ops.loss import native_cpu as fused_cpu
from mtp_ext.ops.loss.accumulator import HeadLossAccumulator
from tests.support.loss_calls import Call, assert_no_worse_than_eager, calls

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def rows_stay_on_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, rows are marked as they are on a GPU."""
    for module in (row_loop, row_selection):
        monkeypatch.setattr(module, "counts_stay_on", lambda device: True)
    monkeypatch.setattr(fused_cpu, "takes", lambda weight, group_name: False)


@given(calls())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_call_is_no_worse_than_eager(rows_stay_on_device: None, call: Call) -> None:
    assert_no_worse_than_eager(call)


def test_nan_in_a_row_without_target_reaches_nothing(rows_stay_on_device: None) -> None:
    hidden, weight = torch.randn(6, 8), torch.randn(11, 8, requires_grad=True)
    targets = torch.tensor([1, -100, 3, -100, 10, 0])
    hidden[targets < 0] = float("nan")
    hidden.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, targets)
    assert isinstance(loss, torch.Tensor)
    grad_hidden, grad_weight = torch.autograd.grad(loss, (hidden, weight))
    assert loss.isfinite() and grad_weight.isfinite().all()
    assert torch.equal(grad_hidden[targets < 0], torch.zeros(2, 8))


def test_marks_are_the_rows_that_count() -> None:
    rows, valid = device_rows.mark_rows(torch.tensor([1, 2, 4, -1, -1, -1]))
    assert rows.tolist() == [-1, 1, 2, -1, 4, -1]
    assert valid.tolist() == [False, True, True, False, True, False]
    rows, valid = device_rows.mark_rows(torch.empty(0, dtype=torch.int64))
    assert rows.numel() == valid.numel() == 0


@pytest.mark.parametrize(("rows", "scale"), [(0, 1.0), (1, 1.0), (3, 2.0), (4096, 4096.0), (10**6, 4096.0)])
def test_float16_scale(rows: int, scale: float) -> None:
    assert device_rows.float16_scale(rows) == scale


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_value_is_read_on_the_host(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, reduction: str) -> None:
    """A fake CUDA tensor has no values: whatever asks for one fails here, as it would stall the stream on a GPU."""
    monkeypatch.setattr(checks, "check_backend", lambda device: None)
    with FakeTensorMode():
        hidden = torch.empty(2, 3, 16, 32, dtype=dtype, device="cuda")  # no gradients: autograd needs a real device
        weight = torch.empty(50, 32, dtype=dtype, device="cuda")
        labels = torch.empty(3, 18, dtype=torch.int64, device="cuda")
        result = multi_token_cross_entropy(
            hidden,
            weight,
            labels,
            document_ids=torch.empty(3, 18, dtype=torch.int64, device="cuda"),
            token_weights=torch.empty(3, 18, device="cuda"),
            class_weights=torch.empty(50, device="cuda"),
            head_weights=[1.0, 0.5],
            bias=torch.empty(50, dtype=dtype, device="cuda"),
            label_smoothing=0.1,
            reduction=reduction,
        )
    assert result.loss.device.type == "cuda" and result.loss.dtype == torch.float32
    assert result.loss.shape == ((2, 3, 16) if reduction == "none" else ())


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_body_of_the_operators_reads_no_value_either(dtype: torch.dtype) -> None:
    """The public functions trace through fake operators; this runs what is inside of them, on tensors without values.

    With fake CUDA tensors it needs a CUDA build of torch: .ci/trace_cuda.py.
    """

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    accumulator = HeadLossAccumulator(
        empty(3, 18, dtype=torch.int64),
        empty(50, 32, dtype=dtype),
        seq_len=16,
        n_heads=2,
        token_weights=empty(3, 18),
        class_weights=empty(50),
        bias=empty(50),
        need_grad_bias=True,
        chunk_rows=10,
    )
    grads = accumulator.add_all(empty(2, 3, 16, 32, dtype=dtype))
    assert isinstance(grads, torch.Tensor) and grads.shape == (2, 3, 16, 32)
    assert accumulator.result().loss.device.type == "meta" and accumulator.grad_weight is not None
    with pytest.raises((NotImplementedError, RuntimeError)):  # what a read would have raised
        accumulator.n_valid.tolist()
