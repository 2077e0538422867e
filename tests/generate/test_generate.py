from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from mtp_ext.generate import DecodingStats, GenerationOutput, generate
from mtp_ext.generate.sampling import Sampling, draw
from mtp_ext.nn import KVCache, MTPConfig, MTPModel
from mtp_ext.nn.cached_forward import CachedForward

pytestmark = pytest.mark.usefixtures("one_thread")

VOCAB_SIZE = 23
LENGTHS = (5, 1, 9, 5)


@pytest.fixture
def model() -> MTPModel:
    """Two trunk layers, three heads, grouped queries; weights large enough that tokens and positions matter."""
    config = MTPConfig(
        VOCAB_SIZE, 16, 5, 4, n_kv_heads=2, d_ff=24, n_future=3, max_seq_len=40, init_std=0.8, unembed_init_std=1.0
    )
    return MTPModel(config).double()


@pytest.fixture
def prompts() -> list[Tensor]:
    return [torch.randint(VOCAB_SIZE, (n,)) for n in LENGTHS]


def recomputed(model: MTPModel, prompt: Tensor, n: int) -> list[int]:
    """Greedy decoding without a cache: the whole sequence through the model for every token."""
    tokens = prompt
    for _ in range(n):
        tokens = torch.cat([tokens, model(tokens[None])[0, -1].argmax()[None]])
    return tokens[len(prompt) :].tolist()


def as_lists(output: GenerationOutput) -> list[list[int]]:
    return [row.tolist() for row in output.tokens]


def test_cached_decoding_equals_recomputation(model: MTPModel, prompts: list[Tensor]) -> None:
    for prompt in prompts:
        expected = recomputed(model, prompt, 20)
        assert len(set(expected)) > 3, "a constant continuation would hide a stale cache"
        assert as_lists(generate(model, prompt[None], 20)) == [expected]


def test_unequal_prompts_in_a_batch_equal_one_by_one(model: MTPModel, prompts: list[Tensor]) -> None:
    expected = [recomputed(model, prompt, 15) for prompt in prompts]
    assert as_lists(generate(model, prompts, 15)) == expected


def test_equal_prompts_as_a_tensor_and_as_a_list(model: MTPModel) -> None:
    prompt = torch.randint(VOCAB_SIZE, (3, 6))
    expected = [recomputed(model, row, 10) for row in prompt]
    assert as_lists(generate(model, prompt, 10)) == expected
    assert as_lists(generate(model, list(prompt.int()), 10)) == expected


def test_the_whole_context_can_be_used(model: MTPModel, prompts: list[Tensor]) -> None:
    assert as_lists(generate(model, prompts[:1], 35)) == [recomputed(model, prompts[0], 35)]
    message = "within max_seq_len=40, got a prompt of 5 tokens and max_new_tokens=36"
    with pytest.raises(ValueError, match=message):
        generate(model, prompts[:1], 36)


def next_token_logits(model: MTPModel, tokens: torch.Tensor, cache: KVCache, counts: list[int]) -> torch.Tensor:
    """Head 1's logits ``[B, V]`` after the last token of each row; advances the cache by ``counts``."""
    normed = CachedForward(model, tokens, cache, (1,)).outputs((1,), torch.tensor(counts)[:, None] - 1)[1]
    cache.advance(counts)
    return model.heads.logits(1, normed[:, 0])


def test_reading_in_pieces_equals_reading_at_once(model: MTPModel) -> None:
    """Chunked reading (several tokens after others), for rows of equal and of unequal lengths."""
    tokens = torch.randint(VOCAB_SIZE, (2, 12))
    expected = model(tokens)
    for counts in ([4, 4], [4, 2]):
        cache = KVCache(2, 12)
        padded = tokens[:, :4].clone()
        next_token_logits(model, padded, cache, counts)
        rest = torch.stack([row[n : n + 8] for row, n in zip(tokens, counts, strict=True)])
        logits = next_token_logits(model, rest, cache, [8, 8])
        at = [n + 7 for n in counts]
        torch.testing.assert_close(logits, expected[[0, 1], at], rtol=1e-11, atol=1e-11)
        assert cache.lengths == [n + 8 for n in counts]


def test_the_cache_refuses_what_it_cannot_hold(model: MTPModel) -> None:
    cache = KVCache(1, 4)
    next_token_logits(model, torch.zeros(1, 3, dtype=torch.int64), cache, [3])
    with pytest.raises(ValueError, match=r"holds 4 tokens a row, got 3 \+ 2"):
        next_token_logits(model, torch.zeros(1, 2, dtype=torch.int64), cache, [2])
    with pytest.raises(ValueError, match="must have the cache's 1 rows"):
        next_token_logits(model, torch.zeros(2, 1, dtype=torch.int64), cache, [1, 1])
    with pytest.raises(ValueError, match="document_ids must be None"):
        model.trunk(torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1, dtype=torch.int64), cache)


def test_only_head_1_runs(model: MTPModel, prompts: list[Tensor]) -> None:
    for k in (2, 3):
        model.heads.head(k).register_forward_pre_hook(lambda *args: pytest.fail("a later head ran"))
    generate(model, prompts, 3, n_draft=0)


def test_a_row_ends_with_the_eos_token(model: MTPModel, prompts: list[Tensor]) -> None:
    expected = [recomputed(model, prompt, 15) for prompt in prompts]
    eos = expected[0][4]
    cut = [row[: row.index(eos) + 1] if eos in row else row for row in expected]
    assert len({len(row) for row in cut}) > 1
    output = generate(model, prompts, 15, eos_token=eos, n_draft=0)
    assert as_lists(output) == cut
    assert output.stats.n_forward == max(len(row) for row in cut)
    assert output.stats.n_tokens == sum(len(row) for row in cut)


def test_on_tokens_streams_what_is_returned(model: MTPModel, prompts: list[Tensor]) -> None:
    eos = recomputed(model, prompts[0], 15)[4]
    calls: list[tuple[int, list[int]]] = []
    output = generate(model, prompts, 6, eos_token=eos, on_tokens=lambda row, new: calls.append((row, new)))
    for row, tokens in enumerate(as_lists(output)):
        assert [t for r, new in calls if r == row for t in new] == tokens
    assert [row for row, _ in calls[:4]] == [0, 1, 2, 3], "tokens come step by step"


def test_sampling_repeats_with_its_generator(model: MTPModel, prompts: list[Tensor]) -> None:
    def run(seed: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed)
        return as_lists(generate(model, prompts, 12, temperature=1.5, generator=generator))

    torch.manual_seed(1)
    first = run(7)
    torch.manual_seed(2)
    assert run(7) == first
    assert run(8) != first


def test_sampling_without_a_generator_uses_the_global_one(model: MTPModel, prompts: list[Tensor]) -> None:
    runs = []
    for _ in range(2):
        torch.manual_seed(5)
        runs.append(as_lists(generate(model, prompts, 12, temperature=1.5, top_k=10, top_p=0.9)))
    assert runs[0] == runs[1]


def test_top_1_sampling_is_greedy(model: MTPModel, prompts: list[Tensor]) -> None:
    assert as_lists(generate(model, prompts, 8, temperature=3.0, top_k=1)) == as_lists(generate(model, prompts, 8))


@pytest.mark.slow
def test_sampled_tokens_follow_the_models_distribution(model: MTPModel) -> None:
    prompt = torch.tensor([[3, 1, 4]])
    n = 20_000
    tokens = torch.cat(generate(model, prompt.expand(n, -1), 1, temperature=2.0).tokens)
    expected = (model(prompt)[0, -1] / 2.0).softmax(-1)
    error = (torch.bincount(tokens, minlength=VOCAB_SIZE) / n - expected).abs()
    assert (error <= 5 * (expected * (1 - expected) / n).sqrt() + 1e-9).all()


@pytest.mark.parametrize("fields", [{}, {"softcap": 2.0}, {"variant": "replicated"}, {"tie_embeddings": True}], ids=str)
@pytest.mark.parametrize("options", [{}, {"temperature": 0.8, "top_k": 4}, {"temperature": 1.5, "top_k": 99}], ids=str)
def test_tokens_are_those_drawn_from_all_logits(
    options: dict[str, Any], fields: dict[str, Any], prompts: list[Tensor]
) -> None:
    """Whether the unembedding gives all logits or the best alone."""
    config = MTPConfig(
        VOCAB_SIZE, 16, 5, 4, n_future=3, max_seq_len=40, **({"init_std": 0.8, "unembed_init_std": 1.0} | fields)
    )
    model, sampling = MTPModel(config).double(), Sampling(**options)
    expected: list[list[int]] = [[] for _ in prompts]
    cache, generator = KVCache(len(prompts), 20), torch.Generator().manual_seed(4)
    tokens, counts = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True), list(LENGTHS)
    with torch.no_grad():
        for _ in range(10):
            drawn = draw(sampling.probabilities(next_token_logits(model, tokens, cache, counts)), generator)
            for row, token in zip(expected, drawn.tolist(), strict=True):
                row.append(token)
            tokens, counts = drawn[:, None], [1] * len(prompts)
    generator = torch.Generator().manual_seed(4)
    assert as_lists(generate(model, prompts, 10, n_draft=0, generator=generator, **options)) == expected
    assert len({token for row in expected for token in row}) > 4


def test_greedy_decoding_looks_at_the_best_class_alone(model: MTPModel, prompts: list[Tensor]) -> None:
    """The logits of all classes are not asked for: on a GPU they are never written."""
    with mock.patch.object(model.heads, "logits", side_effect=AssertionError("all logits")):
        generate(model, prompts, 3)
        generate(model, prompts, 3, temperature=1.0, top_k=5)
        with pytest.raises(AssertionError, match="all logits"):
            generate(model, prompts, 3, temperature=1.0)


def test_stats_of_ordinary_decoding(model: MTPModel, prompts: list[Tensor]) -> None:
    stats = generate(model, prompts, 7, n_draft=0).stats
    assert (stats.n_forward, stats.n_tokens, stats.n_drafted, stats.n_accepted) == (7, 28, 0, 0)
    assert stats.histogram == (24,) and stats.acceptance_rate_per_position == ()
    assert (stats.tokens_per_forward, stats.mean_acceptance_length, stats.draft_acceptance_rate) == (1.0, 1.0, 0.0)


def test_stats_by_hand() -> None:
    """The prompt's forward and four rounds of three drafts, of which 0, 3, 1 and 3 were accepted; the last emitted only
    two tokens."""
    stats = DecodingStats(n_forward=5, n_tokens=1 + 1 + 4 + 2 + 2, n_drafted=12, histogram=(1, 1, 0, 2), n_first=1)
    assert stats.n_accepted == 7
    assert stats.tokens_per_forward == 9 / 4
    assert stats.mean_acceptance_length == 1 + 7 / 4
    assert stats.draft_acceptance_rate == 7 / 12
    assert stats.acceptance_rate_per_position == (3 / 4, 2 / 4, 2 / 4)


def test_nothing_to_do(model: MTPModel, prompts: list[Tensor]) -> None:
    output = generate(model, prompts, 0)
    assert as_lists(output) == [[], [], [], []]
    assert output.stats.n_forward == 0 and output.stats.tokens_per_forward == 0.0


def test_no_graph_and_no_change_of_mode(model: MTPModel, prompts: list[Tensor]) -> None:
    model.train()
    generate(model, prompts, 2)
    assert model.training and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"n_draft": 3}, ValueError, r"n_draft must be at most 2 with 3 heads \(heads 2 to n draft\), got 3"),
        ({"n_draft": "most"}, ValueError, "n_draft must be a number or 'auto', got 'most'"),
        ({"draft": "beam"}, ValueError, "draft must be one of greedy, sample, got 'beam'"),
        ({"n_draft": -1}, ValueError, "n_draft must not be negative"),
        ({"max_new_tokens": -1}, ValueError, "max_new_tokens must not be negative"),
        ({"max_new_tokens": 2.0}, TypeError, "max_new_tokens must be an int"),
        ({"prompt": []}, ValueError, "prompt must hold at least one row"),
        ({"prompt": torch.zeros(3, dtype=torch.int64)}, ValueError, r"prompt must be \[B, P\]"),
        ({"prompt": [torch.zeros(0, dtype=torch.int64)]}, ValueError, r"prompt\[0\] must be 1-d with at least one"),
        ({"prompt": [torch.zeros(3)]}, TypeError, r"prompt\[0\] must be"),
        ({"prompt": torch.full((1, 2), VOCAB_SIZE)}, ValueError, r"tokens must be in \[0, 23\)"),
        ({"temperature": -1.0}, ValueError, "temperature must be finite and not negative"),
        ({"temperature": 1.0, "top_k": 0}, ValueError, "top_k must be at least 1"),
        ({"temperature": 1.0, "top_k": 1.5}, TypeError, "top_k must be an int"),
        ({"temperature": 1.0, "top_p": 0.0}, ValueError, r"top_p must be in \(0, 1\]"),
    ],
)
def test_errors_name_the_argument(
    change: dict[str, Any], error: type[Exception], message: str, model: MTPModel, prompts: list[Tensor]
) -> None:
    call: Callable[..., GenerationOutput] = generate
    with pytest.raises(error, match=message):
        call(**({"model": model, "prompt": prompts, "max_new_tokens": 3} | change))
