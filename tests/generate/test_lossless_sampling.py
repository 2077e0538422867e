"""Sampling with drafts against exact enumeration: chi-square over whole continuations, and controls that must fail."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from mtp_ext.generate import DecodingStats, generate
from mtp_ext.generate import round as round_module
from mtp_ext.generate.acceptance import Drafts, Verdict, accept_equal, accept_likely
from mtp_ext.generate.sampling import Sampling
from mtp_ext.nn import MTPConfig, MTPModel

pytestmark = pytest.mark.usefixtures("one_thread")

VOCAB_SIZE, N_NEW, N_ROWS = 4, 4, 20_000
PROMPT = (2, 0, 1)
THRESHOLD = 1e-9


@pytest.fixture(autouse=True)
def _seed(seeded: None) -> None:
    torch.manual_seed(3)


def tiny(variant: str = "parallel") -> MTPModel:
    """Three heads: two drafts, so that the continuations need a prompt's forward and at least two rounds."""
    config = MTPConfig(
        VOCAB_SIZE, 8, 4, 2, d_ff=8, n_future=3, max_seq_len=8, variant=variant, init_std=0.7, unembed_init_std=0.4
    )
    return MTPModel(config).double()


@torch.no_grad()
def exact(model: MTPModel, sampling: Sampling) -> Tensor:
    """The probability of every continuation of ``N_NEW`` tokens under ordinary sampling, in lexicographic order."""
    new = torch.tensor(list(itertools.product(range(VOCAB_SIZE), repeat=N_NEW)))
    read = torch.cat([torch.tensor(PROMPT).expand(len(new), -1), new], dim=1)
    p = sampling.probabilities(model(read)[:, len(PROMPT) - 1 : -1])
    return p.gather(-1, new[..., None])[..., 0].prod(-1)


def drawn(model: MTPModel, seed: int = 0, **options: Any) -> tuple[Tensor, DecodingStats]:
    """How often each continuation comes up in ``N_ROWS``, and the statistics."""
    generator = torch.Generator().manual_seed(seed)
    output = generate(model, torch.tensor([PROMPT]).expand(N_ROWS, -1), N_NEW, generator=generator, **options)
    places = VOCAB_SIZE ** torch.arange(N_NEW - 1, -1, -1)
    index = (torch.stack(output.tokens) * places).sum(-1)
    return torch.bincount(index, minlength=VOCAB_SIZE**N_NEW), output.stats


def p_value(counts: Tensor, probabilities: Tensor) -> float:
    """Pearson's chi-square test; cells that expect fewer than 5 are one cell."""
    assert counts[probabilities == 0].sum() == 0, "a token outside top-k or top-p"
    expected, small = probabilities * counts.sum(), probabilities * counts.sum() < 5
    pooled = [torch.cat([x[~small], x[small].sum()[None]]).double() for x in (counts, expected)]
    observed, wanted = (x[pooled[1] > 0] for x in pooled)
    statistic = ((observed - wanted) ** 2 / wanted).sum()
    return float(torch.special.gammaincc(torch.tensor((len(wanted) - 1) / 2).double(), statistic / 2))


@pytest.mark.slow
@pytest.mark.parametrize(
    "sampling",
    [Sampling(1.0), Sampling(0.8, top_k=3), Sampling(1.2, top_p=0.9)],
    ids=str,
)
@pytest.mark.parametrize("draft", ["greedy", "sample"])
def test_continuations_have_the_models_distribution(draft: str, sampling: Sampling) -> None:
    model = tiny()
    options = {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
    counts, stats = drawn(model, draft=draft, **options)
    assert p_value(counts, exact(model, sampling)) > THRESHOLD
    assert min(stats.histogram) > N_ROWS / 50, "rejections at every depth"


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["replicated", "causal", "sequential_modules"])
@pytest.mark.parametrize("draft", ["greedy", "sample"])
def test_other_heads_and_a_single_draft(draft: str, variant: str) -> None:
    model = tiny(variant)
    counts, stats = drawn(model, n_draft=1, draft=draft, temperature=1.0)
    assert p_value(counts, exact(model, Sampling(1.0))) > THRESHOLD
    assert min(stats.histogram) > N_ROWS / 50


WRONG: dict[str, tuple[str, Callable[[Drafts], Drafts]]] = {
    "the q of another token": ("sample", lambda d: Drafts(d.tokens, with_q(d).flip(-1))),
    "a uniform q": ("sample", lambda d: Drafts(d.tokens, torch.full_like(with_q(d), 1 / VOCAB_SIZE))),
    "a greedy draft taken twice as often": (
        "greedy",
        lambda d: Drafts(d.tokens, torch.nn.functional.one_hot(d.tokens, VOCAB_SIZE).double() / 2),
    ),
    "another draft verified": ("greedy", lambda d: Drafts((d.tokens + 1) % VOCAB_SIZE)),
}


def with_q(drafts: Drafts) -> Tensor:
    assert drafts.probabilities is not None
    return drafts.probabilities


@pytest.mark.slow
@pytest.mark.parametrize("mistake", WRONG)
def test_a_wrong_rule_is_found(mistake: str) -> None:
    """The negative controls: the test above fails by far where the rule is told something wrong about the drafts."""
    draft, spoil = WRONG[mistake]
    model = tiny()

    def wrong(p: Tensor, drafts: Drafts, generator: torch.Generator | None) -> Verdict:
        return accept_likely(p, spoil(drafts) if drafts.tokens.shape[1] else drafts, generator)

    with mock.patch.object(round_module, "accept_likely", wrong):
        counts, _ = drawn(model, draft=draft, temperature=1.0)
    assert p_value(counts, exact(model, Sampling(1.0))) < THRESHOLD


@pytest.mark.parametrize("draft", ["greedy", "sample"])
def test_the_generator_decides(draft: str) -> None:
    model, prompts = tiny("causal"), [torch.tensor(PROMPT), torch.tensor([1])] * 20

    def run(seed: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed)
        output = generate(model, prompts, 5, draft=draft, temperature=1.0, generator=generator)
        return [row.tolist() for row in output.tokens]

    torch.manual_seed(1)
    first = run(7)
    torch.manual_seed(2)
    assert run(7) == first != run(8)


def test_both_kinds_of_drafts_are_greedy_at_temperature_0() -> None:
    model, prompts = tiny("causal"), [torch.tensor(PROMPT), torch.tensor([1])]
    runs = [generate(model, prompts, 5, draft=draft) for draft in ("greedy", "sample")]
    assert [row.tolist() for row in runs[0].tokens] == [row.tolist() for row in runs[1].tokens]
    assert runs[0].stats == runs[1].stats


def test_greedy_acceptance_by_hand() -> None:
    best = torch.tensor([[1, 2, 3], [1, 2, 3], [1, 2, 3], [1, 2, 3]])
    drafts = Drafts(torch.tensor([[1, 2], [1, 0], [0, 2], [0, 0]]))
    verdict = accept_equal(best, drafts)
    assert verdict.n_accepted.tolist() == [2, 1, 0, 0] and verdict.token.tolist() == [3, 2, 1, 1]


@pytest.mark.parametrize("uniform", [0.0, 0.39, 0.41, 1 - 2**-24])
def test_sampled_acceptance_by_hand(uniform: float) -> None:
    """p / q is 0.5, 0.4 and infinite for the three tokens; a rejected first draft leaves only the last."""
    p, q = torch.tensor([0.25, 0.2, 0.55]), torch.tensor([0.5, 0.5, 0.0])
    drafts = Drafts(torch.tensor([[0], [1]]), q.expand(2, 1, -1))
    with mock.patch.object(torch, "rand", lambda shape, **_: torch.full(shape, uniform)):
        verdict = accept_likely(p.expand(2, 2, -1), drafts, None)
    assert verdict.n_accepted.tolist() == [int(uniform < 0.5), int(uniform < 0.4)]
    assert all(token == 2 for n, token in zip(*verdict, strict=True) if n == 0)


@pytest.mark.parametrize("q", [None, torch.tensor([0.1, 0.3, 0.6])], ids=["greedy", "sample"])
def test_a_rejection_by_rounding_draws_from_p(q: Tensor | None) -> None:
    """Where p = q, and where p is all on a greedy draft, nothing is left of p after a rejection."""
    p = torch.tensor([0.0, 0.0, 1 - 2**-24]) if q is None else q
    drafts = Drafts(torch.tensor([[2]]), None if q is None else q.expand(1, 1, -1))
    with mock.patch.object(torch, "rand", lambda shape, **_: torch.ones(shape)):
        n_accepted, token = accept_likely(p.expand(1, 2, -1), drafts, None)
    assert n_accepted.tolist() == [0] and p[token] > 0
