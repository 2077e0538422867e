"""The transforms of torch.func: the values of plain autograd, or an error that says what to do instead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, grad_and_value, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils._pytree import tree_leaves

from mtp_ext.ops import linear_cross_entropy, multi_token_cross_entropy, reference
from mtp_ext.ops.rms_norm import rms_norm, rms_norm_heads

ROWS, WIDTH, VOCAB, SAMPLES = 12, 8, 17, 3
Loss = Callable[..., Tensor]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"label_smoothing": 0.1, "bias": torch.linspace(-1, 1, VOCAB).double()},
    {"reduction": "sum", "softcap": 3.0, "token_weights": torch.linspace(0, 1, ROWS).double()},
    {"reduction": "none", "z_loss": 0.1},
    {"return_lse": True, "ignore_index": 3},
]
TRANSFORMS: dict[str, Callable[[Loss], Callable[..., Any]]] = {
    "grad": lambda f: grad(f, (0, 1)),
    "grad and value": lambda f: grad_and_value(f, (0, 1)),
    "vjp": lambda f: lambda h, w: vjp(f, h, w)[1](torch.tensor(-2.5, dtype=h.dtype)),
    "jacrev": lambda f: jacrev(f, (0, 1)),
    "vmap": lambda f: lambda h, w: vmap(f, (0, None))(samples(h), w),
    "per-sample gradients": lambda f: lambda h, w: vmap(grad(f, (0, 1)), (0, None))(samples(h), w),
    "gradient of samples": lambda f: grad(lambda h, w: vmap(f, (0, None))(samples(h), w).square().sum(), (0, 1)),
    "samples of samples": lambda f: lambda h, w: vmap(vmap(f, (0, None)), (None, 0))(samples(h), samples(w)),
}
BEYOND: dict[str, tuple[Callable[[Loss], Callable[..., Any]], str]] = {
    "grad of grad": (lambda f: grad(lambda h, w: grad(f)(h, w).square().sum()), "no second derivative"),
    "mixed": (lambda f: grad(lambda h, w: grad(f, 1)(h, w).square().sum()), "no second derivative"),
    "jacrev of jacrev": (lambda f: jacrev(jacrev(f)), "no second derivative"),
    "hessian": (hessian, "no forward-mode derivative"),
    "jacfwd": (jacfwd, "no forward-mode derivative"),
    "jvp": (lambda f: lambda h, w: jvp(lambda h: f(h, w), (h,), (h,)), "no forward-mode derivative"),
}


def samples(x: Tensor) -> Tensor:
    return torch.stack([x * (i + 1) for i in range(SAMPLES)])


def summed(out: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    return out.sin().sum() if isinstance(out, Tensor) else out[0] + out[1].sin().sum()


@pytest.fixture
def made() -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight = torch.randn(ROWS, WIDTH).double(), torch.randn(VOCAB, WIDTH).double()
    return hidden, weight, torch.randint(VOCAB, (ROWS,))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_one_head(transform: Callable[[Loss], Any], options: dict[str, Any], made: tuple[Tensor, ...]) -> None:
    hidden, weight, targets = made
    found, expected = (
        transform(lambda h, w, f=f: summed(f(h, w, targets, **options)))(hidden, weight)
        for f in (linear_cross_entropy, reference.linear_cross_entropy)
    )
    for ours, right in zip(tree_leaves(found), tree_leaves(expected), strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_n_heads(reduction: str) -> None:
    hidden, weight = torch.randn(2, 2, 5, WIDTH).double(), torch.randn(VOCAB, WIDTH).double()
    labels, bias, head_weights = torch.randint(VOCAB, (2, 7)), torch.randn(VOCAB).double(), torch.rand(2).double()

    def loss(f: Any) -> Loss:
        def total(h: Tensor, w: Tensor, b: Tensor, hw: Tensor) -> Tensor:
            out = f(h, w, labels, bias=b, head_weights=hw, detach_weight=(1,), reduction=reduction)
            return out.loss.sin().sum()  # type: ignore[no-any-return]

        return total

    arguments, every = (hidden, weight, bias, head_weights), (0, 1, 2, 3)
    expected = grad(loss(reference.multi_token_cross_entropy), every)(*arguments)
    for ours, right in zip(grad(loss(multi_token_cross_entropy), every)(*arguments), expected, strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-10, atol=1e-12)
    if reduction == "mean":  # "none" multiplies the rows' losses with the weights outside of the operator
        of_weights = grad(loss(multi_token_cross_entropy), 3)
        with pytest.raises(RuntimeError, match="no second derivative"):
            grad(lambda h: of_weights(h, *arguments[1:]).sum())(hidden)


def test_samples_of_everything_with_a_gradient_outside(made: tuple[Tensor, ...]) -> None:
    hidden, weight, _ = made
    many, targets = samples(hidden).requires_grad_(), torch.randint(VOCAB, (SAMPLES, ROWS))
    vmap(lambda h, t: linear_cross_entropy(h, weight, t))(many, targets).sum().backward()
    alone = samples(hidden).requires_grad_()
    sum(linear_cross_entropy(h, weight, t) for h, t in zip(alone, targets, strict=True)).backward()  # type: ignore[union-attr]
    torch.testing.assert_close(many.grad, alone.grad)
    found = vmap(lambda h: multi_token_cross_entropy(h.view(1, 1, ROWS, WIDTH), weight, targets[:1]))(many[:, None])
    assert [x.shape for x in found] == [(SAMPLES,), (SAMPLES, 1), (SAMPLES, 1), (SAMPLES, 1), (SAMPLES,)]
    targets[1, 2] = VOCAB
    with pytest.raises(ValueError, match=r"targets must be in \[0, 17\).*got 17"):
        vmap(lambda h, t: linear_cross_entropy(h, weight, t))(many, targets)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("transform", "message"), BEYOND.values(), ids=BEYOND)
def test_derivatives_that_are_not_there(
    transform: Callable[[Loss], Any], message: str, options: dict[str, Any], made: tuple[Tensor, ...]
) -> None:
    hidden, weight, targets = made
    with pytest.raises(RuntimeError, match=message):
        transform(lambda h, w: summed(linear_cross_entropy(h, w, targets, **options)))(hidden, weight)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_dual_tensors(options: dict[str, Any], made: tuple[Tensor, ...]) -> None:
    hidden, weight, targets = made
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="no forward-mode derivative"):
        linear_cross_entropy(forward_ad.make_dual(hidden, hidden), weight, targets, **options)


@pytest.mark.parametrize("name", ["token_weights", "class_weights"])
def test_what_has_no_gradient_is_refused(name: str, made: tuple[Tensor, ...]) -> None:
    hidden, weight, targets = made
    weights = torch.ones(SAMPLES, ROWS if name == "token_weights" else VOCAB)

    def of_samples(weights: Tensor) -> Tensor:
        one = vmap(lambda h, x: linear_cross_entropy(h, weight, targets, **{name: x}))
        return one(samples(hidden), weights).sum()

    with pytest.raises(ValueError, match=f"{name} must not require grad"):
        grad(lambda x: linear_cross_entropy(hidden, weight, targets, **{name: x}))(weights[0])
    with pytest.raises(RuntimeError, match="no gradient for an argument that requires one"):
        grad(of_samples)(weights)


def test_a_gradient_buffer_is_refused(made: tuple[Tensor, ...]) -> None:
    hidden, weight, targets = made
    buffer = torch.zeros_like(weight)
    with pytest.raises(ValueError, match=r"grad_weight_out must be None within torch\.func"):
        grad(lambda h: linear_cross_entropy(h, weight, targets, grad_weight_out=buffer))(hidden)
    assert not buffer.any()


@pytest.mark.parametrize("norm", [rms_norm, rms_norm_heads])
def test_norms(norm: Callable[[Tensor, Tensor, float], Tensor]) -> None:
    x, weight = torch.randn(3, 4, WIDTH).double(), torch.randn(*[2] * (norm is rms_norm_heads), WIDTH).double()

    def loss(x: Tensor, weight: Tensor) -> Tensor:
        return norm(x, weight, 1e-5).sin().sum()

    leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    for ours, right in zip(grad(loss, (0, 1))(x, weight), expected, strict=True):
        torch.testing.assert_close(ours, right)
    torch.testing.assert_close(vmap(grad(loss), (0, None))(x, weight), expected[0])
    second = torch.autograd.functional.hessian(lambda x: loss(x, weight), x)
    torch.testing.assert_close(hessian(loss)(x, weight), second)
