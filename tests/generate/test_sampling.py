from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mtp_ext.generate.sampling import Sampling, draw

PROBABILITIES = (0.1, 0.4, 0.05, 0.2, 0.25)


def logits(*probabilities: float) -> Tensor:
    return torch.tensor(probabilities, dtype=torch.float64).log()


def expect(actual: Tensor, *expected: float) -> None:
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=actual.dtype), rtol=1e-12, atol=1e-15)


def test_plain_softmax() -> None:
    expect(Sampling(1.0).probabilities(logits(*PROBABILITIES)), *PROBABILITIES)


def test_temperature_is_a_power_of_the_probabilities() -> None:
    powers = [p**2 for p in PROBABILITIES]
    expect(Sampling(0.5).probabilities(logits(*PROBABILITIES)), *(p / sum(powers) for p in powers))


def test_temperature_0_is_the_most_likely_token() -> None:
    expect(Sampling().probabilities(logits(*PROBABILITIES)), 0, 1, 0, 0, 0)


def test_a_tiny_temperature_makes_no_nan() -> None:
    expect(Sampling(1e-300).probabilities(logits(*PROBABILITIES)), 0, 1, 0, 0, 0)


def test_top_k_keeps_the_k_most_likely() -> None:
    expect(Sampling(1.0, top_k=2).probabilities(logits(*PROBABILITIES)), 0, 0.4 / 0.65, 0, 0, 0.25 / 0.65)
    expect(Sampling(1.0, top_k=9).probabilities(logits(*PROBABILITIES)), *PROBABILITIES)


def test_top_k_keeps_exactly_k_of_equals() -> None:
    expect(Sampling(1.0, top_k=2).probabilities(logits(0.25, 0.25, 0.25, 0.25)), 0.5, 0.5, 0, 0)


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(0.39, (1,)), (0.41, (1, 4)), (0.64, (1, 4)), (0.66, (1, 4, 3)), (0.94, (1, 4, 3, 0)), (1.0, (0, 1, 2, 3, 4))],
)
def test_top_p_keeps_the_fewest_that_reach_p(top_p: float, kept: tuple[int, ...]) -> None:
    total = sum(PROBABILITIES[i] for i in kept)
    expected = [PROBABILITIES[i] / total if i in kept else 0.0 for i in range(5)]
    expect(Sampling(1.0, top_p=top_p).probabilities(logits(*PROBABILITIES)), *expected)


def test_a_tiny_top_p_keeps_one() -> None:
    expect(Sampling(1.0, top_p=1e-9).probabilities(logits(*PROBABILITIES)), 0, 1, 0, 0, 0)


def test_top_p_counts_within_top_k() -> None:
    """Of the three kept by top-k (0.40, 0.25, 0.20 of 0.85), two reach 0.7: 0.65 / 0.85."""
    expect(Sampling(1.0, top_k=3, top_p=0.7).probabilities(logits(*PROBABILITIES)), 0, 0.4 / 0.65, 0, 0, 0.25 / 0.65)


def test_rows_are_filtered_on_their_own() -> None:
    rows = torch.stack([logits(*PROBABILITIES), logits(*reversed(PROBABILITIES))])
    probabilities = Sampling(1.0, top_k=1).probabilities(rows)
    assert probabilities.argmax(-1).tolist() == [1, 3] and probabilities.sum(-1).tolist() == [1, 1]


def test_draws_follow_the_filtered_distribution() -> None:
    n = 50_000
    generator = torch.Generator().manual_seed(0)
    sampling = Sampling(1.0, top_k=3)
    tokens = draw(sampling.probabilities(logits(*PROBABILITIES)).expand(n, -1), generator)
    assert set(tokens.tolist()) == {1, 3, 4}
    share = (tokens == 4).double().mean().item()
    expected = 0.25 / 0.85
    assert abs(share - expected) < 5 * math.sqrt(expected * (1 - expected) / n)


def test_16_bit_logits_are_widened() -> None:
    assert Sampling(1.0).probabilities(torch.zeros(1, 5).bfloat16()).dtype == torch.float32


@pytest.mark.parametrize(
    "sampling",
    [Sampling(0.7, top_k=1), Sampling(0.7, top_k=5), Sampling(2.0, top_k=9, top_p=0.6), Sampling(1, 50)],
    ids=str,
)
def test_the_best_alone_give_the_same_probabilities(sampling: Sampling) -> None:
    scores = torch.randn(200, 50, dtype=torch.float64)
    assert sampling.n_best is not None
    best = scores.topk(sampling.n_best)
    of_best = sampling.probabilities_of_best(best.values, best.indices, 50)
    torch.testing.assert_close(of_best, sampling.probabilities(scores), rtol=1e-14, atol=0)


def test_draws_keep_the_leading_dimensions_and_need_no_sum() -> None:
    weights = torch.zeros(2, 3, 5)
    weights[..., 4] = 7
    weights[1, 0, 4], weights[1, 0, 2] = 0, 0.1
    assert draw(weights, None).tolist() == [[4, 4, 4], [2, 4, 4]]


def test_only_top_k_and_temperature_0_leave_the_rest_unread() -> None:
    assert Sampling().n_best == 1 and Sampling(1.0, top_k=7).n_best == 7
    assert Sampling(1.0).n_best is None and Sampling(1.0, top_p=0.5).n_best is None
