"""A GPU's path, whose row counts no host sees: its arithmetic on the CPU, and its traces with fake CUDA tensors."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch._subclasses.fake_tensor import FakeTensorMode

from mtp_ext.ops import linear_cross_entropy, multi_token_cross_entropy
from mtp_ext.ops.common.backend import Backend, CpuBackend, use_backend
from mtp_ext.ops.loss.accumulator import HeadLossAccumulator
from mtp_ext.ops.loss.arguments import LossCall, Needs
from mtp_ext.ops.loss.loop.head_terms import float16_scale
from mtp_ext.ops.loss.options import RowOptions
from tests.support.accuracy import assert_accurate
from tests.support.drawn_calls import calls
from tests.support.loss_calls import Call

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class Unseen(CpuBackend):
    """The CPU's arithmetic, whose rows are marked as they are on a GPU."""

    sees_values = False

    def __init__(self) -> None:
        super().__init__(native_loss=False)


@pytest.fixture
def rows_stay_on_device() -> Iterator[None]:
    with use_backend(Unseen()):
        yield


@given(calls())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_call_is_accurate(rows_stay_on_device: None, call: Call) -> None:
    assert_accurate(call)


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


@pytest.mark.parametrize(("rows", "scale"), [(0, 1.0), (1, 1.0), (3, 2.0), (4096, 4096.0), (10**6, 4096.0)])
def test_float16_scale(rows: int, scale: float) -> None:
    assert float16_scale(rows) == scale


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_value_is_read_on_the_host(dtype: torch.dtype, reduction: str) -> None:
    """A fake CUDA tensor has no values: whatever asks for one fails here, as it would stall the stream on a GPU."""
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

    call = LossCall(
        labels=empty(3, 18, dtype=torch.int64),
        seq_len=16,
        n_heads=2,
        first_shift=1,
        compute_dtype=dtype,
        options=RowOptions(class_weights=empty(50)),
        bias=empty(50),
        token_weights=empty(3, 18),
        chunk_rows=10,
    )
    with use_backend(Backend("meta")):  # the loop that a GPU runs
        accumulator = HeadLossAccumulator(call, empty(50, 32, dtype=dtype), Needs(True, True, True))
        (grads,) = accumulator.add_all([empty(2, 3, 16, 32, dtype=dtype)])
        result = accumulator.result()
    assert grads is not None and grads.shape == (2, 3, 16, 32) and accumulator.grad_bias is not None
    assert result.loss.device.type == "meta" and accumulator.grad_weight is not None
    with pytest.raises((NotImplementedError, RuntimeError)):  # what a read would have raised
        result.n_valid.tolist()
