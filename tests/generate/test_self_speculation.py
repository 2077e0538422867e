"""Self-speculative decoding: greedy tokens, the caches, where rows end, what is counted."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from mtp_ext.generate import GenerationOutput, generate
from mtp_ext.nn import ComposedModel, KVCache, MTPConfig, MTPModel
from mtp_ext.nn.multi_token_model import MultiTokenModel
from mtp_ext.nn.transformer.layers import Block
from mtp_ext.nn.transformer.trunk import Trunk

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

VOCAB_SIZE = 11
N_NEW = 20
LENGTHS = (5, 1, 9, 5)
SHAPES: dict[str, dict[str, Any]] = {
    **{name: {"variant": name} for name in ("parallel", "linear", "replicated", "causal", "anticausal", "shared")},
    "shared norm": {"shared_final_norm": True},
    "tied": {"tie_embeddings": True, "embed_init_std": 1.0},
    "tied replicated": {"variant": "replicated", "tie_embeddings": True},
    "own unembeddings": {"variant": "causal", "replicate_unembedding": True},
    "soft cap": {"softcap": 3.0},
}


@pytest.fixture
def prompts() -> list[Tensor]:
    return [torch.randint(VOCAB_SIZE, (n,)) for n in LENGTHS]


def tiny(n_future: int = 4, **fields: Any) -> MTPModel:
    """Weights large enough that tokens and positions matter."""
    shape: dict[str, Any] = {"n_kv_heads": 2, "d_ff": 24, "max_seq_len": 40, "init_std": 0.6, "unembed_init_std": 1.0}
    return MTPModel(MTPConfig(VOCAB_SIZE, 16, 6, 4, n_future=n_future, **(shape | fields))).double()


def composed(variant: str = "parallel", first_layer: int = 2) -> ComposedModel:
    """Heads of one's own on a trunk that decodes: two transformer layers and a matrix."""
    config = MTPConfig(VOCAB_SIZE, 16, 2, 4, d_ff=24, n_future=1, variant="linear", max_seq_len=40)
    trunk = Trunk(config, nn.Embedding(VOCAB_SIZE, 16))
    trunk.embed = trunk._borrowed[0]
    heads = [Block(config, first_layer), Block(config, 3), nn.Linear(16, 16)]
    return ComposedModel(trunk, heads, nn.Linear(16, VOCAB_SIZE), variant=variant).double()


def counting(n_future: int, *, scale: float = 1.0, **fields: Any) -> MTPModel:
    """Oracle heads: head ``k`` says ``x + k`` after ``x``, which is what head 1 says after the drafts."""
    fields = {"residual_init_scale": 0.0, "replicate_unembedding": True, "max_seq_len": 64} | fields
    model = MTPModel(MTPConfig(8, 8, 6, 2, d_ff=16, n_future=n_future, **fields)).double()
    with torch.no_grad():
        model.embed.weight.copy_(torch.eye(8))
        for k in range(n_future):
            model.unembed.get_parameter("weight")[k].copy_(scale * torch.eye(8).roll(k + 1, 0))
    return model


def as_lists(output: GenerationOutput) -> list[list[int]]:
    return [row.tolist() for row in output.tokens]


class CacheAudit:
    """Before every forward, compares the cache of trunk and heads with one computed from scratch."""

    def __init__(self, model: MultiTokenModel, prompts: list[Tensor]) -> None:
        self.read = [row.tolist() for row in prompts]
        self.wanted = [len(row) + N_NEW for row in prompts]
        self.n_compared, self.outputs = 0, model.cached_outputs

    def on_tokens(self, row: int, tokens: list[int]) -> None:
        self.read[row] += tokens

    def __call__(self, tokens: Tensor, cache: KVCache, active: Collection[int]) -> dict[int, Tensor]:
        for row, read in enumerate(self.read):
            if cache.max_length and len(read) < self.wanted[row]:
                self.compare(row, torch.tensor([read[:-1]]), cache, active)
                self.n_compared += 1
        return self.outputs(tokens, cache, active)

    def compare(self, row: int, read: Tensor, cache: KVCache, active: Collection[int]) -> None:
        n = read.shape[1]
        assert cache.lengths[row] == n, "all tokens but the last have been read"
        scratch = KVCache(1, n)
        self.outputs(read, scratch, active)
        assert scratch._slots.keys() == cache._slots.keys()
        for layer, expected in scratch._slots.items():
            for stored, fresh in zip(cache._slots[layer], expected, strict=True):
                torch.testing.assert_close(stored[row, :n], fresh[0], rtol=1e-10, atol=1e-10, msg=f"layer {layer}")


@pytest.mark.parametrize("shape", SHAPES)
def test_greedy_tokens_are_those_of_ordinary_decoding(shape: str, prompts: list[Tensor]) -> None:
    model = tiny(**SHAPES[shape])
    expected = as_lists(generate(model, prompts, 20, n_draft=0))
    assert len({token for row in expected for token in row}) > 3, "a constant continuation would hide a stale cache"
    n_accepted = 0
    for n_draft in (1, 2, 3, None):
        output = generate(model, prompts, 20, n_draft=n_draft)
        assert as_lists(output) == expected
        n_accepted += output.stats.n_accepted
    assert n_accepted > 0, "else nothing was decided by drafts"


@pytest.mark.parametrize("shape", ["parallel", "causal", "anticausal"])
def test_a_rows_tokens_do_not_depend_on_its_batch(shape: str, prompts: list[Tensor]) -> None:
    model = tiny(**SHAPES[shape])
    for at in range(len(prompts)):
        alone = as_lists(generate(model, prompts[at : at + 1], 20))
        assert as_lists(generate(model, prompts[at:] + prompts[:at], 20))[0] == alone[0]


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        *((shape, {}) for shape in SHAPES),
        ("parallel", {"temperature": 1.0}),
        ("causal", {"temperature": 1.0, "draft": "sample"}),
    ],
    ids=str,
)
def test_caches_equal_those_computed_from_scratch(shape: str, options: dict[str, Any], prompts: list[Tensor]) -> None:
    """Trunk and every head, after every round, with rejections at every depth among the rows."""
    model, prompts = tiny(n_future=3, **SHAPES[shape]), prompts * 2
    for n_draft in (1, 2):
        audit = CacheAudit(model, prompts)
        with mock.patch.object(model, "cached_outputs", audit):
            stats = generate(model, prompts, N_NEW, n_draft=n_draft, on_tokens=audit.on_tokens, **options).stats
        assert audit.n_compared == sum(stats.histogram) and all(stats.histogram[:2])


def test_a_stale_cache_is_found(prompts: list[Tensor]) -> None:
    """The negative control: a head that does not read a round's tokens leaves a hole."""
    model = tiny()
    audit = CacheAudit(model, prompts)
    last = model.heads.head(4).get_submodule("block.attention")
    with mock.patch.object(model, "cached_outputs", audit), pytest.raises(AssertionError, match="layer 5"):
        forward = last.forward

        def forgets(x: Tensor, context: Any) -> Tensor:
            y: Tensor = forward(x, context)
            if context.cache.max_length:
                context.cache._slots[5][0][:, context.cache.max_length] = 0
            return y

        last.forward = forgets  # type: ignore[method-assign]
        generate(model, prompts, N_NEW, on_tokens=audit.on_tokens)


@pytest.mark.parametrize("variant", ["parallel", "causal", "anticausal"])
def test_composed_models_draft(variant: str, prompts: list[Tensor]) -> None:
    model = composed(variant)
    expected = as_lists(generate(model, prompts, 20, n_draft=0))
    for row, prompt in zip(expected, prompts, strict=True):
        read = torch.cat([prompt, torch.tensor(row)])[None]
        assert model(read)[0, len(prompt) - 1 : -1].argmax(-1).tolist() == row
    for n_draft in (1, 2):
        assert as_lists(generate(model, prompts, 20, n_draft=n_draft)) == expected


def test_models_that_cannot_decode_are_refused(prompts: list[Tensor]) -> None:
    with pytest.raises(ValueError, match=r"layer index of its own .* got 3 twice"):
        generate(composed(first_layer=3), prompts, 3)
    plain = ComposedModel(nn.Embedding(VOCAB_SIZE, 8), [nn.Linear(8, 8)], nn.Linear(8, VOCAB_SIZE))
    with pytest.raises(TypeError, match=r"context\(tokens, document_ids, cache\) .* got Embedding"):
        generate(plain, prompts, 3)


def test_heads_that_read_tokens_do_not_draft(prompts: list[Tensor]) -> None:
    model = tiny(variant="sequential_modules")
    assert generate(model, prompts, 3).stats.n_drafted == 0
    with pytest.raises(ValueError, match=r"n_draft must be at most 0 .*read the tokens that they would draft"):
        generate(model, prompts, 3, n_draft=1)


def test_a_model_with_one_head_decodes(prompts: list[Tensor]) -> None:
    model = tiny(n_future=1)
    assert as_lists(generate(model, prompts, 5)) == as_lists(generate(model, prompts, 5, n_draft=0))
    with pytest.raises(ValueError, match="n_draft must be at most 0 with 1 heads"):
        generate(model, prompts, 5, n_draft=1)


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}, {"temperature": 1.0, "draft": "sample"}], ids=str)
@pytest.mark.parametrize("variant", ["parallel", "causal", "anticausal", "replicated"])
def test_oracle_heads_give_all_their_tokens(variant: str, options: dict[str, Any]) -> None:
    model = counting(4, scale=1000.0, variant=variant)
    for n_draft in range(4):
        k = n_draft + 1
        output = generate(model, torch.tensor([[3], [6]]), 1 + 5 * k, n_draft=n_draft, **options)
        assert as_lists(output) == [[(start + 1 + i) % 8 for i in range(1 + 5 * k)] for start in (3, 6)]
        stats = output.stats
        assert (stats.n_forward, stats.tokens_per_forward, stats.mean_acceptance_length) == (6, k, k)
        assert stats.n_drafted == stats.n_accepted == 10 * n_draft
        assert stats.acceptance_rate_per_position == (1.0,) * n_draft


@pytest.mark.parametrize("max_new_tokens", range(1, 11))
def test_the_last_round_emits_what_is_wanted(max_new_tokens: int) -> None:
    model = counting(4, max_seq_len=1 + max_new_tokens)  # drafts must not leave the context
    output = generate(model, [torch.tensor([3])], max_new_tokens)
    assert as_lists(output) == [[(4 + i) % 8 for i in range(max_new_tokens)]]
    assert output.stats.n_forward == 1 + -(-(max_new_tokens - 1) // 4)


@pytest.mark.parametrize("n_before", range(8))
def test_eos_inside_a_draft_ends_the_row(n_before: int) -> None:
    """At every place of a round; the other row goes on as if alone."""
    calls: list[tuple[int, list[int]]] = []
    model, prompts = counting(4), [torch.tensor([0, 7]), torch.tensor([3])]
    eos = n_before
    output = generate(model, prompts, 20, eos_token=eos, on_tokens=lambda row, new: calls.append((row, new)))
    expected = [[*range(eos + 1)], [(4 + i) % 8 for i in range((eos - 4) % 8 + 1)]]
    assert as_lists(output) == expected
    for row in range(2):
        assert [token for r, new in calls if r == row for token in new] == expected[row]
    assert [new for row, new in calls if row == 0][1:] in ([], [expected[0][1:5]], [expected[0][1:5], expected[0][5:]])


def test_rows_that_have_ended_change_nothing(prompts: list[Tensor]) -> None:
    model = tiny(variant="causal")
    full = as_lists(generate(model, prompts, 25))
    for eos in range(VOCAB_SIZE):
        cut = [row[: row.index(eos) + 1] if eos in row else row for row in full]
        assert as_lists(generate(model, prompts, 25, eos_token=eos)) == cut


def test_statistics_are_those_of_the_rows(prompts: list[Tensor]) -> None:
    model, calls = tiny(variant="shared"), [[] for _ in prompts]  # type: ignore[var-annotated]
    output = generate(model, prompts, 20, on_tokens=lambda row, new: calls[row].append(new))
    stats = output.stats
    for row, rounds, tokens in zip(stats.rows, calls, output.tokens, strict=True):
        assert row.n_forward == len(rounds) and row.n_tokens == len(tokens) == 20 and row.n_first == 1
        for i, count in enumerate(row.histogram[:-1]):  # the last round may be cut
            assert abs(count - sum(len(new) == i + 1 for new in rounds[1:])) <= 1
    assert stats.histogram == tuple(sum(row.histogram[i] for row in stats.rows) for i in range(4))
    assert stats.n_drafted == sum(row.n_drafted for row in stats.rows) <= 3 * sum(stats.histogram)
    assert stats.n_forward == max(row.n_forward for row in stats.rows)
    assert stats.n_tokens == 80 and stats.tokens_per_forward == (80 - 4) / sum(stats.histogram)
