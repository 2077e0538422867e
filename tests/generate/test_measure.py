"""Measuring decoding: counts are those of `generate`, intervals cover, every forward is timed once."""

from __future__ import annotations

import math
import time

import pytest
import torch
from torch import Tensor

from mtp_ext.generate import generate
from mtp_ext.generate.measure import Estimate, RoundClock, estimate, measure_decoding
from mtp_ext.nn import MTPConfig, MTPModel
from tests.generate.test_self_speculation import counting

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def model() -> MTPModel:
    torch.manual_seed(0)
    shape = {"n_kv_heads": 2, "d_ff": 24, "max_seq_len": 40, "init_std": 0.6, "unembed_init_std": 1.0}
    return MTPModel(MTPConfig(11, 16, 6, 4, n_future=4, **shape)).double()


@pytest.fixture
def prompts() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(11, (n,), generator=generator) for n in (5, 1, 9, 5, 2)]


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "top_p": 0.9}, {"eos_token": 3}])
def test_counts_are_those_of_generate(model: MTPModel, prompts: list[Tensor], options: dict[str, float]) -> None:
    plain, drafted = measure_decoding(model, prompts, 20, [0, None], batch_size=5, **options)
    generator = torch.Generator().manual_seed(0)
    stats = generate(model, prompts, 20, generator=generator, **options).stats
    assert drafted.n_draft == 3 and drafted.rows == list(stats.rows)
    assert drafted.tokens_per_forward.value == pytest.approx(stats.tokens_per_forward)
    rates = [rate.value for rate in drafted.acceptance_per_position]
    assert rates == pytest.approx(stats.acceptance_rate_per_position)
    given = [rate.value for rate in drafted.conditional_acceptance]
    products = [math.prod(given[:i]) for i in range(1, 4)]
    assert [p for p, rate in zip(products, rates, strict=True) if rate] == pytest.approx(
        [rate for rate in rates if rate]
    )
    assert plain.tokens_per_forward == Estimate(1.0, 1.0, 1.0) and plain.acceptance_per_position == []


def test_greedy_texts_are_the_same_with_drafts(model: MTPModel, prompts: list[Tensor]) -> None:
    plain, drafted = measure_decoding(model, prompts, 20, [0, 3], batch_size=2)
    assert drafted.same_texts(plain) == len(prompts)
    sampled = measure_decoding(model, prompts, 20, [0, 3], temperature=1.0)
    assert sampled[1].same_texts(sampled[0]) < len(prompts)


def test_oracle_heads_give_every_token() -> None:
    model = counting(4)
    (drafted,) = measure_decoding(model, torch.tensor([[1], [5], [0]]), 1 + 4 * 5, [3])
    assert drafted.tokens_per_forward == Estimate(4.0, 4.0, 4.0)
    assert drafted.acceptance_per_position == drafted.conditional_acceptance == [Estimate(1.0, 1.0, 1.0)] * 3


def test_the_interval_covers() -> None:
    """Ratios of uneven prompts, 300 times: 95 % of the intervals hold the truth; those of rounds would hold fewer."""
    generator = torch.Generator().manual_seed(0)
    inside = 0
    for _ in range(300):
        rounds = torch.randint(5, 50, (60,), generator=generator).double()
        rate = torch.rand(60, generator=generator, dtype=torch.float64)  # of each prompt, mean 0.5
        found = estimate(torch.binomial(rounds, rate, generator=generator), rounds)
        inside += found.low <= 0.5 <= found.high
        assert found.low <= found.value <= found.high
    assert 0.90 < inside / 300 < 0.99


def test_one_prompt_has_no_interval_and_no_round_no_value() -> None:
    alone = estimate(torch.tensor([3.0]).double(), torch.tensor([4.0]).double())
    assert alone.value == 0.75 and math.isnan(alone.low) and math.isnan(alone.high)
    nothing = estimate(torch.zeros(3).double(), torch.zeros(3).double())
    assert all(map(math.isnan, nothing))
    some = estimate(
        torch.tensor([1.0, 0.0]).double(), torch.tensor([2.0, 0.0]).double()
    )  # a draw without rounds counts for nothing
    assert some == Estimate(0.5, 0.5, 0.5)


def test_every_forward_after_the_first_is_timed_once(model: MTPModel, prompts: list[Tensor]) -> None:
    clock = RoundClock()
    output = generate(model, prompts, 20, eos_token=3, on_tokens=clock)
    assert len({len(text) for text in output.tokens}) > 1  # rows end in different rounds
    assert len(clock.seconds) == output.stats.n_forward - 1


def test_speed_is_that_of_the_rounds(model: MTPModel, prompts: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that counts forwards, a round takes one second, and a batch of two gives two tokens in it."""
    ticks = iter(range(10**6))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(ticks)))
    (plain,) = measure_decoding(model, prompts[:4], 9, [0], batch_size=2)
    assert plain.seconds_per_round == 1.0 and len(plain.round_seconds) == 2 * 8
    assert plain.tokens_per_second == 2.0


def test_time_limit_spares_the_first_batch(model: MTPModel, prompts: list[Tensor]) -> None:
    (found,) = measure_decoding(model, prompts, 4, [1], batch_size=2, seconds=0)
    assert len(found.rows) == len(found.texts) == 2


def test_the_mode_is_restored_and_a_wrong_size_refused(model: MTPModel, prompts: list[Tensor]) -> None:
    measure_decoding(model.train(), prompts, 1, [0])
    assert model.training
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        measure_decoding(model, prompts, 1, [0], batch_size=0)
    with pytest.raises(ValueError, match="prompt must hold at least one row"):
        measure_decoding(model, [], 1, [0])


def test_a_single_token_has_no_speed(model: MTPModel, prompts: list[Tensor]) -> None:
    (found,) = measure_decoding(model, prompts, 1, [3])
    assert math.isnan(found.tokens_per_second) and math.isnan(found.tokens_per_forward.value)
