"""The losses as citizens of autograd: any incoming gradient, any subset of inputs, backward twice, checkpointing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mtp_ext import linear_cross_entropy, multi_token_cross_entropy

N, B, S, D, V = 3, 2, 6, 8, 37


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden, weight, bias and labels."""
    hidden = torch.randn(N, B, S, D, dtype=dtype, requires_grad=True)
    weight = torch.randn(V, D, dtype=dtype, requires_grad=True)
    return hidden, weight, torch.randn(V, dtype=dtype, requires_grad=True), torch.randint(V, (B, S + N))


def mean_loss(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, **options: Any) -> Tensor:
    return multi_token_cross_entropy(hidden, weight, labels, bias=bias, **options).loss


def one_head(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, **options: Any) -> Tensor:
    loss = linear_cross_entropy(hidden[0], weight, labels[:, :S], bias=bias, **options)
    assert isinstance(loss, Tensor)
    return loss


LOSSES: dict[str, Callable[..., Tensor]] = {
    "n heads": mean_loss,
    "n heads, rows": lambda *x, **kw: mean_loss(*x, reduction="none", **kw).square().sum(),
    "one head": one_head,
    "one head, rows": lambda *x, **kw: one_head(*x, reduction="none", **kw).square().sum(),
    "log-sum-exp": lambda h, w, b, y, **kw: sum(
        x.square().sum() for x in linear_cross_entropy(h[0], w, y[:, :S], bias=b, return_lse=True, **kw)
    ),
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_gradcheck(loss: Callable[..., Tensor]) -> None:
    hidden, weight, bias, labels = inputs()
    options = {"label_smoothing": 0.1, "z_loss": 0.01, "softcap": 5.0}
    assert torch.autograd.gradcheck(lambda *x: loss(*x, labels, **options), (hidden, weight, bias))


def test_gradcheck_of_head_weights() -> None:
    hidden, weight, bias, labels = inputs()
    head_weights = torch.rand(N, dtype=torch.float64, requires_grad=True)
    for reduction in ("mean", "sum", "none"):
        assert torch.autograd.gradcheck(
            lambda w, reduction=reduction: mean_loss(hidden, weight, bias, labels, head_weights=w, reduction=reduction),
            (head_weights,),
        )


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_backward_twice(loss: Callable[..., Tensor]) -> None:
    """A peer scales its saved gradients in place, so that its second backward is wrong."""
    *leaves, labels = inputs()
    value = loss(*leaves, labels)
    first = torch.autograd.grad(3.0 * value, leaves, retain_graph=True)
    kept = [g.clone() for g in first]
    for g in first:
        g.mul_(7.0)  # what a user does to a gradient must not reach the saved one
    second = torch.autograd.grad(value, leaves, retain_graph=True)
    again = torch.autograd.grad(value, leaves)
    for a, b, c in zip(kept, second, again, strict=True):
        torch.testing.assert_close(a, 3.0 * b, rtol=1e-12, atol=0)
        assert torch.equal(b, c)


def test_a_gradient_that_is_changed_in_place_leaves_the_saved_one_alone() -> None:
    hidden, weight, bias, labels = inputs()
    loss = mean_loss(hidden, weight, bias, labels)
    loss.backward(retain_graph=True)
    assert hidden.grad is not None
    first = hidden.grad.clone()
    hidden.grad.zero_()
    hidden.grad = None
    loss.backward()
    assert torch.equal(hidden.grad, first)


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 2)])
def test_any_subset_of_inputs(loss: Callable[..., Tensor], wanted: tuple[int, ...]) -> None:
    *leaves, labels = inputs()
    expected = torch.autograd.grad(loss(*leaves, labels), leaves)
    for i, leaf in enumerate(leaves):
        leaf.requires_grad_(i in wanted)
    loss(*leaves, labels).backward()
    for i, leaf in enumerate(leaves):
        assert (leaf.grad is not None) == (i in wanted)
        if leaf.grad is not None:
            torch.testing.assert_close(leaf.grad, expected[i], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_without_gradients_the_value_is_the_same(loss: Callable[..., Tensor]) -> None:
    *leaves, labels = inputs()
    expected = loss(*leaves, labels)
    with torch.no_grad():
        value = loss(*leaves, labels)
    assert not value.requires_grad and torch.equal(value, expected)
    assert torch.equal(loss(*(x.detach() for x in leaves), labels), expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_activation_checkpointing(loss: Callable[..., Tensor], use_reentrant: bool) -> None:
    *leaves, labels = inputs()
    expected = torch.autograd.grad(loss(*leaves, labels), leaves)
    checkpoint(loss, *leaves, labels, use_reentrant=use_reentrant).backward()
    for leaf, g in zip(leaves, expected, strict=True):
        torch.testing.assert_close(leaf.grad, g, rtol=1e-12, atol=0)


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_grad_weight_out_adds_to_a_buffer(loss: Callable[..., Tensor], dtype: torch.dtype) -> None:
    hidden, weight, bias, labels = inputs(dtype)
    (expected,) = torch.autograd.grad(loss(hidden, weight, bias, labels), weight)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    buffer = torch.full((V, D), 5.0, dtype=acc)  # a non-zero destination: added to, not overwritten
    value = loss(hidden, weight, bias, labels, grad_weight_out=buffer)
    value.backward(retain_graph=True)
    assert weight.grad is None and hidden.grad is not None
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(buffer - 5.0, expected.to(acc), rtol=tolerance, atol=tolerance)
    once = buffer.clone()
    (2.0 * value).backward()
    torch.testing.assert_close(buffer - once, 2.0 * (once - 5.0), rtol=1e-4, atol=1e-4)


def test_grad_weight_out_of_frozen_weight_and_hidden_of_a_sequence() -> None:
    hidden, weight, _, labels = inputs(torch.float32)
    (expected,) = torch.autograd.grad(multi_token_cross_entropy(hidden, weight, labels).loss, weight)
    buffer = torch.zeros(V, D)
    heads = [h.detach().requires_grad_() for h in hidden]
    multi_token_cross_entropy(heads, weight.detach(), labels, grad_weight_out=buffer).loss.backward()
    torch.testing.assert_close(buffer, expected)


@pytest.mark.parametrize("scale", [1.0, 65536.0])
def test_float16_gradients_survive_the_loss_scale(scale: float) -> None:
    """A scale of 65536 is infinite in float16, and gradients that wait for it in float16 would have underflowed."""
    hidden = torch.randn(1, 64, 64, D).half().requires_grad_()
    weight = (0.01 * torch.randn(V, D)).half().requires_grad_()
    labels = torch.randint(V, (64, 65))
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    (scale * multi_token_cross_entropy(*exact, labels).loss).backward()
    (scale * multi_token_cross_entropy(hidden, weight, labels).loss).backward()
    for ours, expected in zip((hidden, weight), exact, strict=True):
        assert ours.grad is not None and expected.grad is not None
        torch.testing.assert_close(ours.grad, expected.grad.half(), rtol=2e-3, atol=6e-8)


def test_only_the_loss_is_differentiable() -> None:
    hidden, weight, _, labels = inputs()
    for reduction in ("mean", "none"):
        out = multi_token_cross_entropy(hidden, weight, labels, reduction=reduction)
        assert out.loss.requires_grad
        assert not any(x.requires_grad for x in out[1:])
