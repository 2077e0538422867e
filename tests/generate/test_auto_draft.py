"""The number of drafts that pays, and the parts of a round's time, by a clock that counts tokens and heads."""

from __future__ import annotations

import functools
import gc
import logging
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from mtp_ext.generate import GenerationOutput, auto_draft, decoding, generate
from mtp_ext.generate.auto_draft import AutoDraft
from mtp_ext.generate.stopwatch import PARTS, Stopwatch
from mtp_ext.nn import MTPConfig, MTPModel

pytestmark = pytest.mark.usefixtures("one_thread")

VOCAB_SIZE = 8


def counting(first_wrong: int = 5) -> MTPModel:
    """Head ``k`` says ``x + k`` after ``x``, which is what head 1 says, but from head ``first_wrong`` on."""
    config = MTPConfig(
        VOCAB_SIZE, 8, 6, 2, d_ff=16, n_future=4, residual_init_scale=0.0, replicate_unembedding=True, max_seq_len=400
    )
    model = MTPModel(config).double()
    with torch.no_grad():
        model.embed.weight.copy_(torch.eye(8))
        for k in range(4):
            model.unembed.get_parameter("weight")[k].copy_(torch.eye(8).roll(k + 1 + (k + 1 >= first_wrong), 0))
    return model


class Work:
    """A clock that moves when the model works.

    Args:
        model: The model.
        per_forward, per_token, per_head: Seconds of a forward, for each of a row's tokens, and for a head.
    """

    def __init__(self, model: MTPModel, per_forward: float, per_token: float, per_head: float) -> None:
        self.now, self.costs, self.trunk, self.n_tokens = 0.0, (per_forward, per_token), model.run_trunk, list[int]()
        model.run_trunk = self.run_trunk  # type: ignore[method-assign]
        for k in range(1, 5):
            model.heads.head(k).register_forward_hook(functools.partial(self.count, per_head))

    def run_trunk(self, tokens: Tensor, document_ids: Tensor | None, context: Any) -> Tensor:
        self.n_tokens.append(tokens.shape[1])
        self.now += self.costs[0] + self.costs[1] * tokens.shape[1]
        return self.trunk(tokens, document_ids, context)

    def count(self, seconds: float, *_: Any) -> None:
        self.now += seconds

    def __call__(self) -> float:
        return self.now


def timed(model: MTPModel, work: Work, n: int = 100, **options: Any) -> GenerationOutput:
    prompts = [torch.tensor([3]), torch.tensor([0, 6])]
    with mock.patch.object(decoding, "Stopwatch", functools.partial(Stopwatch, work)):
        return generate(model, prompts, n, **options)


def expected(n: int = 100) -> list[list[int]]:
    return [[(start + 1 + i) % VOCAB_SIZE for i in range(n)] for start in (3, 6)]


@pytest.mark.parametrize(
    ("first_wrong", "costs", "chosen"),
    [
        (5, (1.0, 0.1, 0.1), 3),  # everything is accepted, drafts are cheap
        (5, (0.0, 1.0, 0.5), 0),  # even then each token costs its full price
        (4, (1.0, 0.1, 0.1), 2),  # head 4 is always wrong
        (3, (1.0, 0.1, 0.1), 1),
        (2, (1.0, 0.1, 0.1), 0),
        (4, (100.0, 0.01, 0.01), 3),  # a useless draft that costs next to nothing is not worth the change
    ],
)
def test_what_pays_is_chosen_and_says_the_same(
    first_wrong: int, costs: tuple[float, ...], chosen: int, caplog: pytest.LogCaptureFixture
) -> None:
    model = counting(first_wrong)
    work = Work(model, *costs)
    with caplog.at_level(logging.INFO, "mtp_ext"):
        output = timed(model, work, n_draft="auto")
    assert [row.tolist() for row in output.tokens] == expected()
    assert output.stats.n_draft == chosen
    assert [record.args[0] for record in caplog.records if isinstance(record.args, tuple)][-1:] == [chosen] * (
        chosen < 3
    )
    assert work.n_tokens[-3] == chosen + 1 and max(work.n_tokens) == 4
    assert len(output.stats.histogram) == 4 and output.stats.seconds["auto"] > 0


@pytest.mark.parametrize("variant", ["parallel", "linear", "causal", "anticausal", "sequential_modules"])
@pytest.mark.parametrize("costs", [(1.0, 0.3, 0.01), (1.0, 0.02, 0.01), (1.0, 0.001, 0.0)], ids=str)
def test_greedy_tokens_stay_the_same(variant: str, costs: tuple[float, ...]) -> None:
    """Wherever the number of drafts falls, with heads of random weights, of which some drafts are accepted."""
    config = MTPConfig(VOCAB_SIZE, 16, 6, 4, d_ff=24, variant=variant, max_seq_len=90, init_std=0.6)
    model = MTPModel(config).double()
    prompts = [torch.randint(VOCAB_SIZE, (n,)) for n in (5, 1, 9)]
    expected = [row.tolist() for row in generate(model, prompts, 60, n_draft=0).tokens]
    with mock.patch.object(decoding, "Stopwatch", functools.partial(Stopwatch, Work(model, *costs))):
        output = generate(model, prompts, 60, n_draft="auto")
    assert [row.tolist() for row in output.tokens] == expected
    assert output.stats.n_drafted > 0 and output.stats.n_draft in range(4)


def test_rounds_are_measured_once_for_a_model_and_batch_size() -> None:
    model = counting()
    work = Work(model, 1.0, 0.1, 0.1)
    spent = [timed(model, work, n_draft="auto").stats.seconds["auto"] for _ in range(3)]
    # Four times 0 to 3 drafts: a forward, the tokens, the heads.
    assert spent == [pytest.approx(4 * sum(1 + 0.2 * (n + 1) for n in range(4))), 0.0, 0.0]
    with mock.patch.object(decoding, "Stopwatch", functools.partial(Stopwatch, work)):
        assert generate(model, [torch.tensor([3])], 50, n_draft="auto").stats.seconds["auto"] > 0
    assert timed(model.float(), work, n_draft="auto").stats.seconds["auto"] > 0
    assert timed(counting(), work, 2, n_draft="auto").stats.seconds["auto"] == 0, "too short to be measured"


def test_measuring_draws_no_random_number_of_the_callers() -> None:
    model = counting()
    options: dict[str, Any] = {"temperature": 1.0, "draft": "sample"}
    runs = []
    for n_draft in (3, "auto"):
        work = Work(model, 100.0, 0.0, 0.0) if n_draft == "auto" else Work(counting(), 1.0, 0.0, 0.0)
        torch.manual_seed(1)
        runs.append((timed(model, work, n_draft=n_draft, **options).tokens, torch.rand(1)))
    assert [row.tolist() for row in runs[0][0]] == [row.tolist() for row in runs[1][0]] and runs[0][1] == runs[1][1]


def test_a_model_that_is_gone_is_forgotten() -> None:
    gc.collect()
    before, model = len(auto_draft._measured), counting()
    timed(model, Work(model, 1.0, 0.1, 0.1), n_draft="auto")
    assert len(auto_draft._measured) == before + 1
    del model
    gc.collect()
    assert len(auto_draft._measured) == before


def test_a_choice_needs_rounds_and_a_gain() -> None:
    auto = AutoDraft([1.0, 1.1, 1.2])
    for _ in range(31):
        auto.add([0], 2)
    auto.add([0, 0, 0], 1)  # rounds at the end, with fewer drafts, say nothing
    assert auto.n_draft == 2
    auto.add([0], 2)
    assert auto.n_draft == 0
    close = AutoDraft([1.0, 1.02, 1.02])
    for _ in range(100):
        close.add([0], 2)
    assert close.n_draft == 2, "2 % are not enough"


def test_a_model_with_one_head() -> None:
    model = MTPModel(MTPConfig(VOCAB_SIZE, 8, 2, 2, d_ff=8, n_future=1, max_seq_len=40))
    stats = generate(model, [torch.tensor([1])], 9, n_draft="auto").stats
    assert stats.n_draft == 0 and stats.histogram == (8,)


@pytest.mark.parametrize("variant", ["parallel", "causal", "sequential_modules"])
def test_the_parts_are_the_whole(variant: str) -> None:
    ticks = iter(range(10**6))
    with mock.patch.object(decoding, "Stopwatch", functools.partial(Stopwatch, lambda: float(next(ticks)))):
        model = MTPModel(MTPConfig(VOCAB_SIZE, 8, 6, 2, d_ff=8, variant=variant, max_seq_len=60))
        stats = generate(model, [torch.tensor([1])], 30).stats
    assert tuple(stats.seconds) == PARTS and stats.n_draft == 3
    assert sum(stats.seconds.values()) == next(ticks) - 1
    n_rounds, per_round = stats.n_forward - 1, 3 if variant == "sequential_modules" else 1
    assert stats.seconds["trunk"] == n_rounds and stats.seconds["host"] >= n_rounds
    assert stats.seconds["heads"] == stats.seconds["unembedding"] == (1 + per_round) * n_rounds
    assert all(row.seconds == {} for row in stats.rows)
