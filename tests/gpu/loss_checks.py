"""The fused losses on a GPU: float64 and eager torch as oracles, every option, small and large vocabularies."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

import mtp_ext
from tests.gpu.registry import check
from tests.support.accuracy import assert_accurate
from tests.support.loss_calls import Call

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.1},
    "z_loss": {"z_loss": 1e-3},
    "softcap": {"softcap": 5.0},
    "scale": {"logit_scale": 0.25},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "bias": {"bias": True},
    "class_weights": {"class_weights": True, "label_smoothing": 0.1},
    "token_weights": {"token_weights": True},
    "everything": {
        **{"label_smoothing": 0.2, "z_loss": 1e-3, "softcap": 8.0, "logit_scale": 1.5},
        **{"bias": True, "class_weights": True, "token_weights": True},
    },
}


def compare(device: torch.device, n: int, width: int, vocab: int, dtype: torch.dtype, options: dict[str, Any]) -> None:
    """Values and gradients of a call on ``device`` are as accurate as the CPU's tests demand."""
    g = torch.Generator().manual_seed(n + vocab)
    chosen = dict(options)
    tensors = {
        "hidden": torch.randn(n, width, generator=g).double(),
        "weight": (torch.randn(vocab, width, generator=g) * 0.3).double(),
        "labels": torch.randint(vocab, (n,), generator=g),
    }
    tensors["labels"][torch.rand(n, generator=g) < 0.2] = -100
    if chosen.pop("bias", False):
        tensors["bias"] = torch.randn(vocab, generator=g).double()
    if chosen.pop("class_weights", False):
        tensors["class_weights"] = (torch.rand(vocab, generator=g) + 0.5).double()
    if chosen.pop("token_weights", False):
        tensors["token_weights"] = (torch.rand(n, generator=g) * (torch.rand(n, generator=g) > 0.2)).double()
    assert_accurate(Call(dtype, tensors, chosen, heads=False), device=device)


@check(small=True)
def every_option_and_dtype(device: torch.device) -> None:
    for options, dtype in itertools.product(OPTIONS.values(), DTYPES):
        compare(device, 37, 48, 1003, dtype, options)


@check()
def awkward_vocabularies(device: torch.device) -> None:
    for vocab, dtype in itertools.product((1, 2, 7, 8, 9, 511, 4097, 50257), DTYPES):
        compare(device, 19, 40, vocab, dtype, OPTIONS["plain"])


@check()
def large_vocabularies(device: torch.device) -> None:
    for vocab, dtype in itertools.product((50304, 128256), DTYPES):
        for options in (OPTIONS["plain"], OPTIONS["everything"]):
            compare(device, 64, 64, vocab, dtype, options)


@check(small=True)
def heads_equal_the_cpu(device: torch.device) -> None:
    """Several heads, documents and weights: the CPU's kernels as the oracle, in float32."""
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 2, 33, 24, generator=g)
    weight = torch.randn(301, 24, generator=g)
    labels = torch.randint(301, (2, 36), generator=g)
    documents = torch.arange(36).div(10, rounding_mode="floor").repeat(2, 1)
    tokens = torch.rand(2, 36, generator=g)

    def run(on: torch.device) -> list[Tensor]:
        leaves = [hidden.to(on).requires_grad_(), weight.to(on).requires_grad_()]
        result = mtp_ext.multi_token_cross_entropy(
            *leaves,
            labels.to(on),
            document_ids=documents.to(on),
            token_weights=tokens.to(on),
            head_weights=[1.0, 0.5, 0.25],
            chunk_rows=50,
        )
        return [*(x.detach() for x in result), *torch.autograd.grad(result.loss, leaves)]

    for ours, oracle in zip(run(device), run(torch.device("cpu")), strict=True):
        torch.testing.assert_close(ours.cpu(), oracle, rtol=2e-5, atol=2e-6)


@check(small=True)
def a_target_that_is_no_class_makes_the_loss_nan(device: torch.device) -> None:
    hidden, weight = torch.randn(8, 16, device=device), torch.randn(50, 16, device=device, requires_grad=True)
    for bad in (50, -1, 2**40):
        targets = torch.arange(8, device=device)
        targets[3] = bad
        loss = mtp_ext.linear_cross_entropy(hidden, weight, targets)
        assert isinstance(loss, Tensor) and loss.isnan().item(), bad
        previous = mtp_ext.debug_checks(True)
        try:
            mtp_ext.linear_cross_entropy(hidden, weight, targets)
        except ValueError as error:
            assert "targets must be in [0, 50)" in str(error)
        else:
            raise AssertionError("debug_checks(True) did not raise")
        finally:
            mtp_ext.debug_checks(previous)


@check(small=True)
def a_wrong_normalizer_makes_the_loss_nan(device: torch.device) -> None:
    hidden, weight = torch.randn(1, 2, 8, 16, device=device), torch.randn(50, 16, device=device)
    labels = torch.randint(50, (2, 9), device=device)
    for wrong in (0.0, -1.0, float("inf")):
        normalizer = torch.tensor(wrong, device=device)
        assert mtp_ext.multi_token_cross_entropy(hidden, weight, labels, normalizer=normalizer).loss.isnan().item()


@check(small=True)
def float16_gradients_behind_a_large_normalizer_do_not_underflow(device: torch.device) -> None:
    hidden, weight = torch.randn(2, 8, 64, 32).half(), (0.1 * torch.randn(500, 32)).half()
    labels = torch.randint(500, (8, 66))
    exact = [x.double().requires_grad_() for x in (hidden, weight)]
    loss = mtp_ext.multi_token_cross_entropy(*exact, labels, normalizer=1e6).loss
    expected = torch.autograd.grad(2.0**20 * loss, exact)
    for normalizer in (1e6, torch.tensor(1e6, device=device)):
        made = [x.to(device).requires_grad_() for x in (hidden, weight)]
        loss = mtp_ext.multi_token_cross_entropy(*made, labels.to(device), normalizer=normalizer).loss
        found = torch.autograd.grad(2.0**20 * loss, made)
        for a, b in zip(found, expected, strict=True):
            assert (a.cpu().double() - b).norm() <= 2**-10 * b.norm()


@check(small=True)
def nan_in_an_ignored_row_changes_nothing(device: torch.device) -> None:
    hidden, weight = torch.randn(64, 16, device=device), torch.randn(50, 16, device=device)
    targets = torch.randint(50, (64,), device=device)
    targets[::3] = -100

    def run() -> list[Tensor]:
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        loss = mtp_ext.linear_cross_entropy(*leaves, targets)
        assert isinstance(loss, Tensor)
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    clean = run()
    hidden[::3] = float("nan")
    assert all(torch.equal(a, b) for a, b in zip(clean, run(), strict=True))


@check(small=True)
def a_bound_on_the_targets_changes_no_result(device: torch.device) -> None:
    """Rows beyond the bound take no part; without it, they are rows of zeros."""
    labels = torch.randint(50, (2, 35), device=device)
    labels[:, ::2] = -100
    hidden, weight = torch.randn(3, 2, 32, 16, device=device), torch.randn(50, 16, device=device)
    counts = mtp_ext.count_targets(labels.cpu(), 3, seq_len=32)

    def run(max_valid: list[int] | None) -> list[Tensor]:
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        result = mtp_ext.multi_token_cross_entropy(*leaves, labels, chunk_rows=40, max_valid=max_valid)
        return [*(x.detach() for x in result), *torch.autograd.grad(result.loss, leaves)]

    every = run(None)
    for slack in (0, 1):
        for ours, expected in zip(run([count + slack for count in counts]), every, strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    head_loss = run([counts[0], counts[1] - 1, counts[2]])[1]
    assert head_loss.isnan().tolist() == [False, True, False]


@check(small=True)
def no_target_and_no_rows(device: torch.device) -> None:
    weight = torch.randn(50, 16, device=device, requires_grad=True)
    for n in (0, 5):
        hidden = torch.randn(n, 16, device=device, requires_grad=True)
        loss = mtp_ext.linear_cross_entropy(hidden, weight, torch.full((n,), -100, device=device))
        assert isinstance(loss, Tensor)
        grads = torch.autograd.grad(loss, (hidden, weight))
        assert loss.item() == 0.0 and all(float(g.abs().sum()) == 0.0 for g in grads)


@check()
def two_runs_are_bitwise_equal(device: torch.device) -> None:
    hidden = torch.randn(3000, 256, device=device, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(32000, 256, device=device, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(32000, (3000,), device=device)

    def run() -> list[Tensor]:
        loss = mtp_ext.linear_cross_entropy(hidden, weight, targets, chunk_rows=1024)
        assert isinstance(loss, Tensor)
        return [loss.detach(), *torch.autograd.grad(loss, (hidden, weight))]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))
