"""A bound on the targets that the host knows: so many rows are multiplied on a GPU, and no count is waited for."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mtp_ext import count_targets, linear_cross_entropy, multi_token_cross_entropy
from mtp_ext.ops.common.backend import Backend, use_backend
from mtp_ext.ops.loss.accumulator import HeadLossAccumulator
from mtp_ext.ops.loss.arguments import LossCall, Needs
from mtp_ext.ops.loss.loop.row_selection import valid_rows_first
from tests.support.pretend_cuda import pretend_cuda

N, B, S, D, V = 3, 4, 32, 16, 50
LABELS = torch.randint(V, (B, S + N), generator=torch.Generator().manual_seed(0)).index_fill(
    1, torch.arange(0, S, 2), -100
)


@pytest.fixture
def gpu_path() -> Iterator[None]:
    """Nobody looks at the number of rows, but for the test."""
    with pretend_cuda(may_wait=True):
        yield


def leaves() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(N, B, S, D, generator=g).requires_grad_(), torch.randn(V, D, generator=g).requires_grad_()


def gemm_flop(label_len: int, max_valid: list[int] | None) -> int:
    """FLOP of the matrix products of a loss whose row counts nobody can read: tensors without values."""
    labels = torch.empty(B, label_len, dtype=torch.int64, device="meta")
    hidden, weight = torch.empty(N, B, S, D, device="meta"), torch.empty(V, D, device="meta")
    with use_backend(Backend("meta")), FlopCounterMode(display=False) as counter:  # the loop that a GPU runs
        call = LossCall(labels, S, N, 1, torch.float32, chunk_rows=50, max_valid=max_valid)
        HeadLossAccumulator(call, weight, Needs(True, True, False)).add_all([hidden])
    flop: int = counter.get_total_flops()
    return flop


def test_rows_beyond_the_bound_cost_no_gemm_work() -> None:
    assert gemm_flop(S + N, None) == 6 * N * B * S * D * V
    assert gemm_flop(S + N, [100, 3, 64]) == 6 * (100 + 3 + 64) * D * V
    assert gemm_flop(S + N, [0, 0, 0]) == 0
    assert gemm_flop(S + N, [10**9] * N) == 6 * N * B * S * D * V


def test_rows_past_the_labels_cost_no_gemm_work_either() -> None:
    assert gemm_flop(S, None) == 6 * B * ((S - 1) + (S - 2) + (S - 3)) * D * V
    assert gemm_flop(S, [1000, 7, 1000]) == 6 * (B * (S - 1) + 7 + B * (S - 3)) * D * V


def test_few_rows_are_not_worth_moving() -> None:
    every = 6 * N * B * S * D * V
    assert gemm_flop(S + N, [B * S - 1, B * S, B * S]) == every
    assert gemm_flop(S + N, [B * S - 6, B * S, B * S]) == every - 6 * 6 * D * V


@pytest.mark.parametrize("slack", [0, 1, 1000])
def test_the_loss_is_that_of_all_rows(gpu_path: None, slack: int) -> None:
    bounds = [count + slack for count in count_targets(LABELS, N, seq_len=S)]
    (hidden, weight), (same_hidden, same_weight) = leaves(), leaves()
    every = multi_token_cross_entropy(hidden, weight, LABELS, chunk_rows=60)
    every.loss.backward()
    found = multi_token_cross_entropy(same_hidden, same_weight, LABELS, chunk_rows=60, max_valid=bounds)
    found.loss.backward()
    assert torch.equal(found.n_valid, every.n_valid) and torch.equal(found.top1, every.top1)
    for ours, expected in ((found.loss, every.loss), (same_hidden.grad, hidden.grad), (same_weight.grad, weight.grad)):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-7)


def test_nan_in_a_row_that_is_left_out_reaches_nothing(gpu_path: None) -> None:
    hidden, weight = leaves()
    targets = LABELS[:, :S]
    rows = hidden.detach()[0].masked_fill(targets[..., None] < 0, float("nan")).requires_grad_()
    loss = linear_cross_entropy(rows, weight, targets, max_valid=int((targets >= 0).sum()) + 1)
    assert isinstance(loss, Tensor)
    loss.backward()
    assert loss.isfinite() and weight.grad is not None and weight.grad.isfinite().all()
    assert rows.grad is not None and torch.equal(rows.grad[targets < 0], torch.zeros(B * S // 2, D))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_more_targets_than_the_bound_make_their_head_nan(gpu_path: None, reduction: str) -> None:
    hidden, weight = leaves()
    counts = count_targets(LABELS, N, seq_len=S)
    bounds = [counts[0], counts[1] - 1, counts[2]]
    out = multi_token_cross_entropy(hidden, weight, LABELS, max_valid=bounds, reduction=reduction)
    assert out.head_loss.isnan().tolist() == [False, True, False]
    out.loss.sum().backward()
    assert hidden.grad is not None and weight.grad is not None
    assert hidden.grad[1].isnan().any() and hidden.grad[[0, 2]].isfinite().all() and weight.grad.isnan().any()


def test_more_targets_than_the_bound_are_an_error_where_they_are_counted() -> None:
    hidden, weight = leaves()
    counts = count_targets(LABELS, N, seq_len=S)
    with pytest.raises(ValueError, match=f"max_valid must be at least .*, got 3 for the {counts[0]} of head 1"):
        multi_token_cross_entropy(hidden, weight, LABELS, max_valid=3)
    with pytest.raises(ValueError, match=f"got {counts[2] - 1} for the {counts[2]} of head 3"):
        multi_token_cross_entropy(hidden, weight, LABELS, max_valid=[*counts[:2], counts[2] - 1])
    with pytest.raises(ValueError, match="got 1 for the 64 of head 1"):
        linear_cross_entropy(hidden[0], weight, LABELS[:, :S], max_valid=1)


def test_counts_are_those_of_the_loss() -> None:
    g = torch.Generator().manual_seed(2)
    documents = torch.randint(0, 2, LABELS.shape, generator=g).cumsum(1)
    weights = torch.randint(0, 2, LABELS.shape, generator=g).float()
    hidden, weight = leaves()
    for options in ({}, {"document_ids": documents}, {"document_ids": documents, "token_weights": weights}):
        out = multi_token_cross_entropy(hidden, weight, LABELS, **options)
        assert count_targets(LABELS, N, seq_len=S, **options) == out.n_valid.tolist()
    assert count_targets(LABELS.T.contiguous().T.int(), N, seq_len=S, ignore_index=7) != out.n_valid.tolist()
    assert count_targets(LABELS[:, :0], N, seq_len=0) == [0] * N


def test_count_targets_names_what_is_wrong() -> None:
    for change, error, match in (
        ({"labels": LABELS.float()}, TypeError, "labels must be"),
        ({"labels": LABELS[0]}, ValueError, r"labels must be \[B, S'\]"),
        ({"seq_len": S + N + 1}, ValueError, "S' >= seq_len = 36"),
        ({"n_heads": 0}, ValueError, "n_heads must be at least 1, got 0"),
        ({"document_ids": LABELS[:, 1:]}, ValueError, "document_ids must have shape"),
        ({"token_weights": LABELS}, TypeError, "token_weights must be"),
    ):
        with pytest.raises(error, match=match):
            count_targets(**({"labels": LABELS, "n_heads": N, "seq_len": S} | change))  # type: ignore[arg-type]


@given(st.data(), st.integers(1, 4), st.integers(1, 12))
def test_rows_that_count_move_to_the_front(data: st.DataObject, n_heads: int, n_rows: int) -> None:
    flags = data.draw(st.lists(st.booleans(), min_size=n_heads * n_rows, max_size=n_heads * n_rows))
    limits = data.draw(st.lists(st.integers(0, n_rows), min_size=n_heads, max_size=n_heads))
    valid = torch.tensor(flags).view(n_heads, n_rows)
    flat, counts = valid_rows_first(valid, limits)
    assert flat.unique().numel() == flat.numel() == sum(limits)
    assert torch.equal(counts, valid.flatten()[flat])
    for k, mine in enumerate(flat.split(limits)):
        of_head = [int(row) for row in mine if valid.flatten()[row]]
        assert of_head == [k * n_rows + i for i in range(n_rows) if valid[k, i]][: limits[k]]
