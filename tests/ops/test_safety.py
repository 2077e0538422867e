"""What a careful user relies on without reading the source."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import mtp_ext
from mtp_ext import _C, linear_cross_entropy, multi_token_cross_entropy

N, B, S, D, V = 3, 2, 40, 16, 211


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    hidden = torch.randn(N, B, S, D, dtype=dtype, requires_grad=True)
    weight = torch.randn(V, D, dtype=dtype, requires_grad=True)
    return hidden, weight, torch.randint(V, (B, S + N))


def gradients(loss: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss.sum(), leaves)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_no_valid_target_gives_zero(reduction: str, dtype: torch.dtype) -> None:
    """Dividing by a count of 0 gave peers NaN."""
    hidden, weight, labels = inputs(dtype)
    class_weights = torch.zeros(V)
    for out in (
        multi_token_cross_entropy(hidden, weight, torch.full_like(labels, -100), reduction=reduction),
        multi_token_cross_entropy(hidden, weight, labels, token_weights=torch.zeros(labels.shape), reduction=reduction),
        multi_token_cross_entropy(hidden, weight, labels, class_weights=class_weights, reduction=reduction),
    ):
        assert torch.equal(out.loss, torch.zeros_like(out.loss)) and not out.head_loss.any()
        assert torch.isfinite(out.top1).all() and torch.isfinite(out.accept_length)
        assert all(not g.any() for g in gradients(out.loss, hidden, weight))
    loss = linear_cross_entropy(hidden[0], weight, torch.full((B, S), -100), reduction=reduction)
    assert isinstance(loss, Tensor) and not loss.any()


def test_a_head_without_targets_leaves_the_others_alone() -> None:
    hidden, weight, labels = inputs()
    short = labels[:, :S]
    documents = torch.arange(S).div(2, rounding_mode="floor").expand(B, -1)  # documents of two: only head 1 has targets
    out = multi_token_cross_entropy(hidden, weight, short, document_ids=documents)
    assert out.n_valid.tolist() == [B * S // 2, 0, 0]
    assert out.head_loss[0] > 0 and out.head_loss[1:].tolist() == [0, 0] and out.loss == out.head_loss[0]
    grad_hidden, _ = gradients(out.loss, hidden, weight)
    assert grad_hidden[0].any() and not grad_hidden[1:].any()


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_nothing_leaks_from_ignored_rows(poison: float, reduction: str) -> None:
    """NaN or infinity in padding, in a tail or behind a weight of 0 changes nothing."""
    hidden, weight, labels = inputs()
    labels = labels[:, :S]  # the last k positions of head k have no target
    labels[:, 10:13] = -100
    token_weights = torch.ones(labels.shape)
    token_weights[:, 20] = 0
    bad = hidden.detach().clone()
    for k in range(N):
        for j in (10, 11, 12, 20):
            bad[k, :, j - k - 1] = poison
        bad[k, :, S - k - 1 :] = poison
    bad.requires_grad_()
    options: dict[str, Any] = {"token_weights": token_weights, "reduction": reduction, "z_loss": 0.1}
    clean, poisoned = (multi_token_cross_entropy(h, weight, labels, **options) for h in (hidden, bad))
    for a, b in zip(clean, poisoned, strict=True):
        assert torch.equal(a, b)
    ours, theirs = gradients(poisoned.loss, bad, weight), gradients(clean.loss, hidden, weight)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_not_a_number_in_a_row_that_counts_shows() -> None:
    hidden, weight, labels = inputs()
    bad = hidden.detach().clone()
    bad[1, 0, 3] = float("nan")
    out = multi_token_cross_entropy(bad, weight, labels)
    assert out.loss.isnan() and out.head_loss.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("margin", [5.0, 10.0, 16.0])
def test_a_certain_target_keeps_its_gradient(margin: float, dtype: torch.dtype) -> None:
    """p - 1 of a rounded p is 100 % wrong at p = 0.999 in bfloat16; it broke a peer's convergence."""
    hidden = torch.zeros(1, 4, dtype=dtype)
    hidden[0, 0] = margin
    weight = torch.zeros(V, 4, dtype=dtype)
    weight[7, 0] = 1.0  # logit `margin` for class 7, 0 for all others
    weight[:, 1] = torch.linspace(-1, 1, V).to(dtype)
    hidden.requires_grad_()
    linear_cross_entropy(hidden, weight, torch.tensor([7])).backward()  # type: ignore[union-attr]
    rest = (V - 1) * torch.exp(torch.tensor(-margin, dtype=torch.float64))
    expected = -float(rest / (1 + rest))  # p_y - 1
    assert hidden.grad is not None
    assert abs(float(hidden.grad[0, 0]) - expected) <= 0.01 * abs(expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_chunks_change_the_summation_order_only(dtype: torch.dtype) -> None:
    hidden, weight, labels = inputs(dtype)
    whole = multi_token_cross_entropy(hidden, weight, labels, chunk_rows=10_000)
    expected = gradients(whole.loss, hidden, weight)
    tolerance = 1e-13 if dtype == torch.float64 else 2e-6
    for size in (1, 7, 80, 81):
        out = multi_token_cross_entropy(hidden, weight, labels, chunk_rows=size)
        torch.testing.assert_close(out.loss, whole.loss, rtol=tolerance, atol=0)
        assert torch.equal(out.top1, whole.top1) and torch.equal(out.accept_length, whole.accept_length)
        for a, b in zip(gradients(out.loss, hidden, weight), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * float(b.abs().amax()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_two_runs_are_bitwise_equal(dtype: torch.dtype) -> None:
    hidden, weight, labels = inputs(dtype)
    threads = torch.get_num_threads()
    runs = []
    for count in (threads, threads, 2):  # rows are independent: their losses do not depend on who computes them
        torch.set_num_threads(count)
        out = multi_token_cross_entropy(hidden, weight, labels, softcap=5.0)
        runs.append((*out, *gradients(out.loss, hidden, weight)))
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(runs[0], runs[1], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(runs[0][:5], runs[2][:5], strict=True))


def test_strided_inputs() -> None:
    hidden, weight, labels = inputs()
    out = multi_token_cross_entropy(hidden, weight, labels)
    expected = gradients(out.loss, hidden, weight)
    views = (
        hidden.detach().permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0).requires_grad_(),
        torch.stack([weight.detach(), weight.detach()], -1)[..., 0].requires_grad_(),
        torch.stack([labels, labels], -1)[..., 1],
    )
    assert not any(v.is_contiguous() for v in views)
    strided = multi_token_cross_entropy(*views)
    torch.testing.assert_close(strided.loss, out.loss, rtol=1e-6, atol=0)
    for a, b in zip(gradients(strided.loss, *views[:2]), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("every", [2, 0], ids=["every other", "one for all"])
def test_strided_targets(every: int) -> None:
    """A plain call took any targets for contiguous, and refused a column of a table."""
    hidden, weight = torch.randn(6, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
    targets = torch.randint(V, (12,)).as_strided((6,), (every,))
    loss, expected = (linear_cross_entropy(hidden, weight, t) for t in (targets, targets.contiguous()))
    assert torch.equal(loss, expected)
    for a, b in zip(gradients(loss, hidden, weight), gradients(expected, hidden, weight), strict=True):
        assert torch.equal(a, b)


def test_weightless_rows_cost_no_product() -> None:
    """Ignored, tail, weightless and foreign-document rows never reach a GEMM: no logits of theirs are written."""

    def rows_written() -> int:
        """Since the last call of this function: the memory for logits holds the rows of all heads at once."""
        return _C.release_workspace() // (4 * V)

    hidden, weight, labels = inputs()
    labels[:, 5:15] = -100
    token_weights = torch.ones(labels.shape)
    token_weights[:, 20:25] = 0
    documents = torch.arange(S + N).div(20, rounding_mode="floor").expand(B, -1)
    rows_written()
    out = multi_token_cross_entropy(hidden, weight, labels, token_weights=token_weights, document_ids=documents)
    assert rows_written() == int(out.n_valid.sum()) < N * B * S
    gradients(out.loss, hidden, weight)
    assert rows_written() == 0, "the backward multiplied again"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_replicated_unembeddings_are_those_of_single_heads(dtype: torch.dtype) -> None:
    hidden, _, labels = inputs(dtype)
    labels[:, 10:20] = -100
    weights = torch.randn(N, V, D, dtype=dtype, requires_grad=True)
    out = multi_token_cross_entropy(hidden, weights, labels, detach_weight=(2,), chunk_rows=32)
    grad_hidden, grad_weights = gradients(out.loss, hidden, weights)
    for k in range(N):
        weight = weights[k].detach().requires_grad_()
        one = linear_cross_entropy(hidden[k], weight, labels[:, k + 1 : k + 1 + S], chunk_rows=32)
        assert isinstance(one, Tensor) and torch.equal(one, out.head_loss[k])
        expected_hidden, expected_weight = gradients(one, hidden, weight)
        assert torch.equal(grad_hidden[k], expected_hidden[k])
        assert torch.equal(grad_weights[k], torch.zeros_like(weight) if k == 1 else expected_weight)


def test_debug_checks_is_a_switch() -> None:
    before = mtp_ext.debug_checks(True)
    assert mtp_ext.debug_checks(before) is True
    assert mtp_ext.debug_checks(before) is before


def test_float32_sums_over_a_large_vocabulary_are_blocked() -> None:
    """A serial float32 sum over 128k classes errs by more than the error of one logit."""
    vocab = 128_256
    hidden, weight = torch.randn(4, 8, requires_grad=True), 0.1 * torch.randn(vocab, 8)
    targets = torch.randint(vocab, (4,))
    loss = linear_cross_entropy(hidden, weight, targets)
    exact = torch.nn.functional.cross_entropy(hidden.double() @ weight.double().T, targets)
    assert isinstance(loss, Tensor)
    torch.testing.assert_close(loss.double(), exact, rtol=2e-7, atol=0)


def test_the_sum_of_many_token_weights_keeps_its_digits() -> None:
    """Added one after the other in float32, 200,000 weights sum to a denominator that is 1e-5 off."""
    rows = 200_000
    hidden, weight = torch.ones(rows, 1), torch.zeros(2, 1)
    token_weights = torch.rand(rows) + 0.1
    loss = linear_cross_entropy(hidden, weight, torch.zeros(rows, dtype=torch.int64), token_weights=token_weights)
    torch.testing.assert_close(loss, torch.tensor(2.0).log(), rtol=3e-7, atol=0)
