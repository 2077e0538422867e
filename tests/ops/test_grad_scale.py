"""``grad_scale``: the forward adds the weight's gradient straight to the caller's buffer."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from mtp_ext import debug_checks, linear_cross_entropy, multi_token_cross_entropy
from mtp_ext.ops.common.backend import CpuBackend, use_backend
from tests.support.largest_tensor import LargestTensor
from tests.support.pretend_cuda import pretend_cuda

N, B, S, D, V = 3, 2, 9, 16, 50
DEVICES = {
    "native": lambda: use_backend(CpuBackend()),
    "loop": lambda: use_backend(CpuBackend(native_loss=False)),
    "cuda": partial(pretend_cuda, may_wait=True),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "sum": {"reduction": "sum"},
    "one": {"normalizer": 7.0, "chunk_rows": 7},
    "of heads": {"head_weights": [0.5, 1.0, 2.0], "detach_weight": (2,), "softcap": 5.0},
}


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    with DEVICES[request.param]():
        yield request.param


def inputs(dtype: torch.dtype = torch.float32, *, replicated: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    hidden = torch.randn(N, B, S, D, dtype=dtype, requires_grad=True)
    weight = torch.randn((N, V, D) if replicated else (V, D), dtype=dtype, requires_grad=True)
    return hidden, weight, torch.randint(V, (B, S + N))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("replicated", [False, True])
def test_the_buffer_is_that_of_backward(
    device: str, dtype: torch.dtype, options: dict[str, Any], replicated: bool
) -> None:
    hidden, weight, labels = inputs(dtype, replicated=replicated)
    bias = torch.randn(V, requires_grad=True)
    scale, late, soon = 0.25, torch.full_like(weight, 5.0, dtype=torch.float32), torch.full(weight.shape, 5.0)
    late = late.detach()
    call = partial(multi_token_cross_entropy, hidden, weight, labels, bias=bias, **options)
    expected = call(grad_weight_out=late)
    of_others = torch.autograd.grad(expected.loss * scale, (hidden, bias))
    found = call(grad_weight_out=soon, grad_scale=scale)
    assert (soon != 5.0).any() == (dtype != torch.float16)  # whose factor against underflow may be on the device only
    grads = torch.autograd.grad(found.loss * scale, (hidden, bias))
    tolerance = 2e-5 if dtype == torch.float32 else 2e-2
    for ours, theirs in zip((soon, found.loss, *grads), (late, expected.loss, *of_others), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    assert weight.grad is None


@pytest.mark.parametrize("scale", [1.0, 0.5, 65536.0, torch.tensor(3.0)], ids=str)
def test_micro_batches_accumulate(device: str, scale: float | Tensor) -> None:
    hidden, weight, _ = inputs(torch.float32)
    buffer, whole = torch.zeros(V, D), torch.zeros(V, D)
    for _ in range(3):
        targets = torch.randint(V, (N, B, S))
        loss = linear_cross_entropy(hidden, weight, targets, grad_weight_out=buffer, grad_scale=scale)
        assert isinstance(loss, Tensor)
        (loss * scale).backward()  # type: ignore[no-untyped-call]
        plain = linear_cross_entropy(hidden, weight, targets)
        assert isinstance(plain, Tensor)
        whole += torch.autograd.grad(plain * scale, weight)[0]
        torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(buffer, whole)


def test_head_weights_keep_their_gradients(device: str) -> None:
    hidden, weight, labels = inputs()
    head_weights = torch.tensor([1.0, 0.5, 2.0], requires_grad=True)
    call = partial(multi_token_cross_entropy, hidden, weight, labels, head_weights=head_weights)
    found = call(grad_weight_out=torch.zeros(V, D), grad_scale=4.0)
    torch.testing.assert_close(torch.autograd.grad(found.loss * 4.0, head_weights)[0], 4.0 * found.head_loss)


def test_no_other_gradient_of_the_weight_exists() -> None:
    """Forward and backward allocate nothing of the buffer's size; without grad_scale the forward does."""
    hidden = torch.randn(8, 16, requires_grad=True)
    weight, targets = torch.randn(2000, 16, requires_grad=True), torch.randint(2000, (8,))
    buffer, largest = torch.zeros(2000, 16), {}
    for scale in (None, 1.0):
        with LargestTensor(apart_from=(buffer, weight)) as seen:
            loss = linear_cross_entropy(hidden, weight, targets, grad_weight_out=buffer, grad_scale=scale, chunk_rows=2)
            assert isinstance(loss, Tensor)
            loss.backward()  # type: ignore[no-untyped-call]
        largest[scale] = seen.numel
    assert largest[None] >= buffer.numel() and largest[1.0] < buffer.numel() / 2


def test_another_gradient_is_refused() -> None:
    hidden, weight, labels = inputs()
    loss = multi_token_cross_entropy(hidden, weight, labels, grad_weight_out=torch.zeros(V, D), grad_scale=2.0).loss
    with pytest.raises(
        ValueError, match=r"grad_scale must be the gradient that the loss receives, which is 0\.5 times"
    ):
        loss.backward()  # type: ignore[no-untyped-call]


def test_a_gpu_gives_nan_for_another_gradient() -> None:
    """Without a synchronisation; with debug checks it is an error."""
    hidden, weight, labels = inputs()
    targets = labels[:, :S].expand(N, B, S)
    with pretend_cuda():
        loss = linear_cross_entropy(hidden, weight, targets, grad_weight_out=torch.zeros(V, D), grad_scale=2.0)
        assert isinstance(loss, Tensor)
        (grad,) = torch.autograd.grad(loss, hidden, retain_graph=True)
        (right,) = torch.autograd.grad(loss, hidden, torch.full((), 2.0))
    assert bool(grad.isnan().all()) and bool(right.isfinite().all())
    with pretend_cuda(may_wait=True), pytest.raises(ValueError, match="grad_scale"):
        debug_checks(True)
        try:
            linear_cross_entropy(  # type: ignore[union-attr]
                hidden, weight, targets, grad_weight_out=torch.zeros(V, D), grad_scale=2.0
            ).backward()
        finally:
            debug_checks(False)


def test_without_a_graph_nothing_is_added_and_backward_twice_adds_nothing(device: str) -> None:
    hidden, weight, labels = inputs()
    buffer = torch.zeros(V, D)
    call = partial(multi_token_cross_entropy, hidden, weight, labels, grad_weight_out=buffer, grad_scale=1.0)
    with torch.no_grad():
        call()
    assert not buffer.any()
    loss = call().loss
    added = buffer.clone()
    loss.backward(retain_graph=True)  # type: ignore[no-untyped-call]
    loss.backward()  # type: ignore[no-untyped-call]
    assert added.any() and torch.equal(buffer, added)


def test_an_invalid_target_leaves_the_buffer_alone() -> None:
    hidden, weight, labels = inputs()
    labels[1, 3], buffer = V, torch.zeros(V, D)
    for loop in (True, False):
        with use_backend(CpuBackend(native_loss=loop)), pytest.raises(ValueError, match="targets"):
            multi_token_cross_entropy(hidden, weight, labels, grad_weight_out=buffer, grad_scale=1.0)
    assert not buffer.any()


@pytest.mark.slow
def test_compiled_the_gradient_is_added_once() -> None:
    hidden, weight, labels = inputs()

    def step(buffer: Tensor) -> Tensor:
        loss = multi_token_cross_entropy(hidden, weight, labels, grad_weight_out=buffer, grad_scale=2.0).loss
        (2.0 * loss).backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def compiled(buffer: Tensor) -> Tensor:
        def loss_of(hidden: Tensor, weight: Tensor) -> Tensor:
            return multi_token_cross_entropy(hidden, weight, labels, grad_weight_out=buffer, grad_scale=2.0).loss

        loss = torch.compile(loss_of, backend="aot_eager", fullgraph=True)(hidden, weight)
        (2.0 * loss).backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    buffers = torch.zeros(V, D), torch.zeros(V, D)
    torch.testing.assert_close(step(buffers[0]), compiled(buffers[1]))
    torch.testing.assert_close(*buffers)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"grad_scale": 1.0}, ValueError, "without grad_weight_out"),
        ({"grad_scale": 1.0, "reduction": "none"}, ValueError, "reduction='none'"),
        ({"grad_scale": 0.0}, ValueError, "positive and finite"),
        ({"grad_scale": float("nan")}, ValueError, "positive and finite"),
        ({"grad_scale": "1"}, TypeError, "a number or a 0-d tensor"),
        ({"grad_scale": True}, TypeError, "a number or a 0-d tensor"),
        ({"grad_scale": torch.ones(1)}, ValueError, "0-d"),
        ({"grad_scale": torch.tensor(1.0, requires_grad=True)}, ValueError, "must not require grad"),
    ],
    ids=str,
)
def test_bad_scales(options: dict[str, Any], error: type[Exception], message: str) -> None:
    hidden, weight, labels = inputs()
    buffer = None if "without" in message else torch.zeros(V, D)
    with pytest.raises(error, match=message):
        multi_token_cross_entropy(hidden, weight, labels, grad_weight_out=buffer, **options)


def test_per_row_losses_add_to_the_buffer_without_another() -> None:
    """Their backward knows the incoming gradients."""
    hidden = torch.randn(8, 16, requires_grad=True)
    weight, targets = torch.randn(2000, 16, requires_grad=True), torch.randint(2000, (8,))
    incoming, buffer = torch.rand(8), torch.ones(2000, 16)
    losses = linear_cross_entropy(hidden, weight, targets, reduction="none")
    assert isinstance(losses, Tensor)
    (expected,) = torch.autograd.grad((losses * incoming).sum(), weight)
    losses = linear_cross_entropy(hidden, weight, targets, reduction="none", grad_weight_out=buffer, chunk_rows=2)
    assert isinstance(losses, Tensor)
    with LargestTensor(apart_from=(buffer, weight)) as seen:
        (losses * incoming).sum().backward()  # type: ignore[no-untyped-call]
    assert seen.numel < buffer.numel() / 2
    torch.testing.assert_close(buffer - 1, expected, rtol=1e-4, atol=1e-6)
