"""Self-speculative decoding: greedy tokens, the caches, where rows end, what is counted."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtp_ext.generate import GenerationOutput, generate
from mtp_ext.generate.round import Round
from mtp_ext.nn import ComposedModel, KVCache, MTPConfig, MTPModel
from mtp_ext.nn.cached_forward import CachedForward
from mtp_ext.nn.schedules.head_stack import head_outputs
from mtp_ext.nn.transformer.attention import taken
from mtp_ext.nn.transformer.layers import Block
from mtp_ext.nn.transformer.token_tree import TokenTree
from mtp_ext.nn.transformer.trunk import Trunk
from tests.generate.conftest import VOCAB_SIZE
from tests.support.pretend_cuda import StandIns, pretend_cuda

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

N_NEW = 20
SHAPES: dict[str, dict[str, Any]] = {
    **{name: {"variant": name} for name in ("parallel", "linear", "replicated", "causal", "anticausal", "shared")},
    "sequential_modules": {"variant": "sequential_modules"},
    "shared norm": {"shared_final_norm": True},
    "tied": {"tie_embeddings": True, "embed_init_std": 1.0},
    "tied replicated": {"variant": "replicated", "tie_embeddings": True},
    "own unembeddings": {"variant": "causal", "replicate_unembedding": True},
    "soft cap": {"softcap": 3.0},
}


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

    def __init__(self, model: MTPModel, prompts: list[Tensor]) -> None:
        self.read = [row.tolist() for row in prompts]
        self.wanted = [len(row) + N_NEW for row in prompts]
        self.model, self.n_compared, self.context = model, 0, model.cached_context

    def on_tokens(self, row: int, tokens: list[int]) -> None:
        self.read[row] += tokens

    def __call__(self, tokens: Tensor, cache: KVCache, tree: TokenTree | None = None) -> Any:
        for row, read in enumerate(self.read):
            if cache.max_length and len(read) < self.wanted[row]:
                self.compare(row, torch.tensor([read]), cache)
                self.n_compared += 1
        return self.context(tokens, cache, tree)

    def compare(self, row: int, read: Tensor, cache: KVCache) -> None:
        """All heads that keep something have read all tokens but the last."""
        n = read.shape[1] - 1
        assert cache.lengths[row] == n
        model, scratch = self.model, self.from_scratch(read)
        assert cache._slots.keys() <= scratch._slots.keys() and len(cache._slots) > 2
        for layer, stored in cache._slots.items():
            # Head k of those that read tokens has read some that were drafts, at its last k - 2 positions.
            n_drafts = max(0, layer - model.config.n_trunk_layers - 1) if model.heads.reads_tokens else 0
            for kept, fresh in zip(stored, scratch._slots[layer], strict=True):
                torch.testing.assert_close(
                    kept[row, : n - n_drafts],
                    fresh[0, : n - n_drafts],
                    rtol=1e-10,
                    atol=1e-10,
                    msg=f"layer {layer}",
                )

    def from_scratch(self, read: Tensor) -> KVCache:
        """All layers' keys and values of all tokens but the last, by the forward without queries or windows."""
        scratch, heads = KVCache(1, read.shape[1] - 1), self.model.heads
        context = self.context(read[:, :-1], scratch)
        hidden = self.model.run_trunk(read[:, :-1], None, context)
        head_outputs(heads, hidden, self.model.with_tokens_ahead(context, F.pad(read, (0, heads.n_heads))))
        scratch._slots[-1] = (hidden[:, :, None], read[:, :-1, None, None])
        return scratch


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


@pytest.mark.parametrize("shape", ["parallel", "causal", "anticausal", "sequential_modules"])
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
        ("sequential_modules", {"temperature": 1.0, "draft": "sample"}),
    ],
    ids=str,
)
def test_caches_equal_those_computed_from_scratch(shape: str, options: dict[str, Any], prompts: list[Tensor]) -> None:
    """Trunk and every head, after every round, with rejections at every depth among the rows."""
    model, prompts = tiny(n_future=3, **SHAPES[shape]), prompts * 2
    for n_draft in (1, 2):
        audit = CacheAudit(model, prompts)
        with mock.patch.object(model, "cached_context", audit):
            stats = generate(model, prompts, N_NEW, n_draft=n_draft, on_tokens=audit.on_tokens, **options).stats
        assert audit.n_compared == sum(stats.histogram) and all(stats.histogram[:2])


def test_a_stale_cache_is_found(prompts: list[Tensor]) -> None:
    """The negative control: a head that does not read a round's tokens leaves a hole."""
    model = tiny()
    audit = CacheAudit(model, prompts)
    last = model.heads.head(4).get_submodule("block.attention")
    with mock.patch.object(model, "cached_context", audit), pytest.raises(AssertionError, match="layer 5"):
        forward = last.forward

        def forgets(x: Tensor, context: Any) -> Tensor:
            y: Tensor = forward(x, context)
            if context.cache.max_length:
                context.cache._slots[5][0][:, context.cache.max_length] = 0
            return y

        last.forward = forgets  # type: ignore[method-assign]
        generate(model, prompts, N_NEW, on_tokens=audit.on_tokens)


def test_tokens_read_again_matter(prompts: list[Tensor]) -> None:
    """Another negative control: what heads have read of drafts is wrong if it is not read again."""
    model = tiny(variant="sequential_modules")
    audit = CacheAudit(model, prompts)
    window = CachedForward.window
    without = lambda forward, tokens, n_again, n_ahead: window(forward, tokens, 0, n_ahead)  # noqa: E731
    with mock.patch.object(model, "cached_context", audit), mock.patch.object(CachedForward, "window", without):
        with pytest.raises(AssertionError, match=r"layer [56]"):
            generate(model, prompts, N_NEW, on_tokens=audit.on_tokens)


ONE_PRODUCT = ["parallel", "linear", "causal", "anticausal", "shared"]


@pytest.mark.parametrize("variant", ONE_PRODUCT)
def test_a_gpus_kernel_reads_the_unembedding_once_a_round(variant: str, prompts: list[Tensor]) -> None:
    """Four rows with two drafts are 36 rows of its 64; eight would be 72, and take two calls."""
    model = tiny(n_future=3, variant=variant).bfloat16()
    for rows, expected in ((prompts, [12, 36, 36]), (prompts * 2, [24, 24, 16])):
        with pretend_cuda(may_wait=True):
            with mock.patch.object(StandIns, "_decode", autospec=True, side_effect=StandIns._decode) as decode:
                n_forward = generate(model, rows, 12).stats.n_forward
        shapes = [call.args[1].shape[0] for call in decode.call_args_list]
        assert shapes[:3] == expected and (len(shapes) == n_forward) == (rows is prompts)


@pytest.mark.parametrize("variant", ONE_PRODUCT)
def test_one_product_for_all_heads_says_the_same(variant: str, prompts: list[Tensor]) -> None:
    model = tiny(variant=variant)
    expected = generate(model, prompts, 20)
    with mock.patch.object(Round, "_is_read_once", lambda *_: True):
        output = generate(model, prompts, 20)
    assert as_lists(output) == as_lists(expected) and output.stats == expected.stats


@pytest.mark.parametrize("variant", ["parallel", "causal", "anticausal"])
def test_composed_models_draft(variant: str, prompts: list[Tensor]) -> None:
    model = composed(variant)
    expected = as_lists(generate(model, prompts, 20, n_draft=0))
    for row, prompt in zip(expected, prompts, strict=True):
        read = torch.cat([prompt, torch.tensor(row)])[None]
        assert model(read)[0, len(prompt) - 1 : -1].argmax(-1).tolist() == row
    for n_draft in (1, 2):
        assert as_lists(generate(model, prompts, 20, n_draft=n_draft)) == expected


class Doubling(Block):
    """A layer of one's own with a forward of its own, which knows nothing of queries."""

    def forward(self, x: Tensor, context: Any) -> Tensor:
        y: Tensor = x + self.attention(self.attention_norm(2 * x), context)
        return y


class Wrapped(nn.Module):
    """A layer of one's own around one of ours, which gives the queries alone."""

    takes_queries = True

    def __init__(self, config: MTPConfig, layer: int) -> None:
        super().__init__()
        self.inner = Block(config, layer)

    def forward(self, x: Tensor, context: Any) -> Tensor:
        y: Tensor = 2 * self.inner(x, context)
        return y


def test_outputs_where_they_are_wanted_are_those_of_all_positions() -> None:
    """Head 1 is a layer of ours, 2 and 3 of one's own with and without queries, 4 a matrix; after a ragged cache."""
    model = composed()
    config = model.trunk.config
    heads = [Block(config, 2), Wrapped(config, 3), Doubling(config, 4), nn.Linear(16, 16)]
    model = ComposedModel(model.trunk, heads, nn.Linear(16, VOCAB_SIZE)).double()
    assert [model.heads.head(k).takes_queries for k in range(1, 5)] == [True, True, False, False]
    caches, before = [KVCache(2, 9), KVCache(2, 9)], torch.randint(VOCAB_SIZE, (2, 4))
    new, at = torch.randint(VOCAB_SIZE, (2, 5)), torch.tensor([[0, 3], [2, 4]])
    with torch.no_grad():
        for cache in caches:
            CachedForward(model, before, cache, range(1, 5)).outputs(range(1, 5), torch.arange(4).expand(2, -1))
            cache.advance([4, 1])
        everywhere = CachedForward(model, new, caches[0], range(1, 5)).outputs(
            range(1, 5), torch.arange(5).expand(2, -1)
        )
        forward = CachedForward(model, new, caches[1], range(1, 5))
        wanted = forward.outputs((1,), at) | forward.outputs((2, 3, 4), at)
    for k in range(1, 5):
        torch.testing.assert_close(wanted[k], taken(everywhere[k], at), rtol=1e-12, atol=1e-12)
    for layer, stored in caches[0]._slots.items():
        for one, other in zip(stored, caches[1]._slots[layer], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_independent_heads_compute_their_layers_once_a_round(prompts: list[Tensor]) -> None:
    """Their feed-forward networks see one token of a row, and head 1's those that it verifies."""
    model, seen = tiny(), dict[int, list[int]]()
    for k in range(1, 5):
        ff = model.heads.head(k).get_submodule("block.ff")
        ff.register_forward_pre_hook(lambda _, x, k=k: seen.setdefault(k, []).append(x[0].shape[1]))
    generate(model, prompts, 10)
    assert seen[1][1:3] == [4, 4] and seen[1][0] == 1, "the prompt's forward gives one token"
    assert all({*seen[k]} == {1} for k in (2, 3, 4))


def test_models_that_cannot_decode_are_refused(prompts: list[Tensor]) -> None:
    with pytest.raises(ValueError, match=r"layer index of its own .* got 3 twice"):
        generate(composed(first_layer=3), prompts, 3)
    plain = ComposedModel(nn.Embedding(VOCAB_SIZE, 8), [nn.Linear(8, 8)], nn.Linear(8, VOCAB_SIZE))
    with pytest.raises(TypeError, match=r"context\(tokens, document_ids, cache\) .* got Embedding"):
        generate(plain, prompts, 3)


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
