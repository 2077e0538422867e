"""Trees of drafts: the tokens of ordinary decoding, in fewer forwards than with one draft at each position."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from mtp_ext.generate import generate
from mtp_ext.generate.sampling import Sampling
from mtp_ext.nn.transformer.kv_cache import KVCache
from mtp_ext.nn.transformer.token_tree import TokenTree
from tests.generate.conftest import VOCAB_SIZE
from tests.generate.test_lossless_sampling import N_ROWS, THRESHOLD, drawn, exact, p_value
from tests.generate.test_lossless_sampling import tiny as tiny_sampler
from tests.generate.test_self_speculation import (
    N_NEW,
    SHAPES,
    CacheAudit,
    as_lists,
    composed,
    counting,
    tiny,
)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

TREES = ((2,), (3, 2), (2, 2, 2), (1, 1, 1), (4, 1, 2))
READING = "sequential_modules"  # heads read the tokens that they draft: no tree


def test_tables_of_a_tree() -> None:
    tree = TokenTree((2, 1, 2))
    assert tree.levels == (1, 2, 2, 4) and tree.size == 9
    depths, ancestors = tree.tables(torch.device("cpu"))
    assert depths.tolist() == [0, 1, 1, 2, 2, 3, 3, 3, 3]
    seen = [row.nonzero().flatten().tolist() for row in ancestors]
    assert seen == [
        [0],
        [0, 1],
        [0, 2],
        [0, 1, 3],
        [0, 2, 4],
        *([0, 1, 3, i] for i in (5, 6)),
        *([0, 2, 4, i] for i in (7, 8)),
    ]


def test_a_path_ends_where_the_chosen_token_is_not_in_the_tree() -> None:
    tree = TokenTree((2, 2))
    children = [torch.tensor([[5, 6]]).expand(3, -1), torch.tensor([[7, 8]]).expand(3, -1)]
    chosen = torch.zeros(3, tree.size, dtype=torch.int64)
    chosen[0, 0], chosen[0, 2] = 6, 7  # the second child, then its first
    chosen[1, 0], chosen[1, 1] = 5, 9  # the first child, then none
    path, n_followed = tree.path(chosen, children)
    assert path.tolist() == [[0, 2, 5], [0, 1, 1], [0, 0, 0]] and n_followed.tolist() == [2, 1, 0]


def test_the_cache_keeps_a_path() -> None:
    cache = KVCache(2, 8)
    cache.lengths = [1, 3]
    slots = cache.slots(4, torch.device("cpu"))
    new = torch.arange(8.0).view(2, 4, 1, 1)
    cache.write(0, new, -new, slots)
    cache.keep(torch.tensor([[0, 2, 3], [0, 1, 3]]))
    keys, values = cache._slots[0]
    assert keys[0, 1:4].flatten().tolist() == [0, 2, 3] and keys[1, 3:6].flatten().tolist() == [4, 5, 7]
    assert torch.equal(values, -keys)


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape != READING])
def test_greedy_tokens_are_those_of_ordinary_decoding(shape: str, prompts: list[Tensor]) -> None:
    model = tiny(**SHAPES[shape])
    expected = as_lists(generate(model, prompts, 20, n_draft=0))
    chain = generate(model, prompts, 20).stats
    for tree in TREES:
        output = generate(model, prompts, 20, tree=tree)
        assert as_lists(output) == expected
        if len(tree) == 3:
            assert sum(output.stats.histogram) <= sum(chain.histogram)
    assert as_lists(generate(model, prompts[2:3], 20, tree=(3, 2)))[0] == expected[2]


def test_heads_of_ones_own(prompts: list[Tensor]) -> None:
    for variant, first_layer in (("parallel", 2), ("causal", 2)):
        model = composed(variant, first_layer)
        expected = as_lists(generate(model, prompts, 20, n_draft=0))
        assert as_lists(generate(model, prompts, 20, tree=(3, 2))) == expected


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape != READING])
def test_caches_equal_those_computed_from_scratch(shape: str, prompts: list[Tensor]) -> None:
    """After every round, with paths of every length among the rows."""
    model, rows = tiny(n_future=3, **SHAPES[shape]), prompts * 2
    audit = CacheAudit(model, rows)
    with mock.patch.object(model, "cached_context", audit):
        stats = generate(model, rows, N_NEW, tree=(3, 2), on_tokens=audit.on_tokens).stats
    assert audit.n_compared == sum(stats.histogram) and all(stats.histogram[:2])


def test_a_cache_without_the_path_is_found(prompts: list[Tensor]) -> None:
    """The negative control: drafts stay where they were read."""
    model, rows = tiny(n_future=3), prompts * 2
    audit = CacheAudit(model, rows)
    with mock.patch.object(model, "cached_context", audit), mock.patch.object(KVCache, "keep", lambda self, path: None):
        with pytest.raises(AssertionError, match="layer"):
            generate(model, rows, N_NEW, tree=(3, 2), on_tokens=audit.on_tokens)


@pytest.mark.parametrize("sampling", [Sampling(1.0), Sampling(0.8, top_k=3), Sampling(1.2, top_p=0.9)], ids=str)
def test_continuations_have_the_models_distribution(sampling: Sampling) -> None:
    model = tiny_sampler()
    options = {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
    counts, stats = drawn(model, tree=(2, 2), **options)
    assert p_value(counts, exact(model, sampling)) > THRESHOLD
    assert min(stats.histogram) > N_ROWS / 50


def test_a_tree_whose_likeliest_token_is_always_taken_is_found() -> None:
    """The negative control: a draft that is accepted without asking head 1."""
    model = tiny_sampler()

    def always(self: TokenTree, chosen: Tensor, children: list[Tensor]) -> tuple[Tensor, Tensor]:
        chosen = chosen.clone()
        chosen[:, 0] = children[0][:, 0]
        return path(self, chosen, children)

    path = TokenTree.path
    with mock.patch.object(TokenTree, "path", always):
        counts, _ = drawn(model, tree=(2, 2), temperature=1.0)
    assert p_value(counts, exact(model, Sampling(1.0))) < THRESHOLD


def test_oracles_give_a_token_at_each_depth() -> None:
    stats = generate(counting(4), torch.tensor([[0]]), 1 + 4 * 5, tree=(2, 1, 2)).stats
    assert stats.tokens_per_forward == 4.0 and stats.n_drafted == 5 * (2 + 2 + 4)


def test_second_choices_are_accepted() -> None:
    """A head whose second choice is right: nothing is accepted of one draft, everything of two."""
    model = counting(2)
    with torch.no_grad():
        weight = model.unembed.get_parameter("weight")
        weight[1] += 2 * torch.eye(8).roll(5, 0)  # x + 5 is said more loudly than x + 2
    prompt = torch.tensor([[3]])
    plain, chain, tree = (generate(model, prompt, 17, **options) for options in ({"n_draft": 0}, {}, {"tree": (2,)}))
    assert as_lists(plain) == as_lists(chain) == as_lists(tree)
    assert chain.stats.tokens_per_forward == 1.0 and tree.stats.tokens_per_forward == 2.0


def test_ends_within_a_tree() -> None:
    model = counting(4)
    for n_new in range(1, 12):
        assert as_lists(generate(model, torch.tensor([[0]]), n_new, tree=(2, 2)))[0] == [
            (1 + i) % 8 for i in range(n_new)
        ]
    for end in range(1, 8):
        found = generate(model, torch.tensor([[0], [4]]), 30, tree=(2, 1, 2), eos_token=end)
        assert all(row.tolist()[-1] == end and row.tolist().count(end) == 1 for row in found.tokens)
    whole = counting(4, max_seq_len=16)  # up to the last position
    assert len(generate(whole, torch.tensor([[0, 1, 2]]), 13, tree=(3, 3, 3)).tokens[0]) == 13


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"tree": (0,)}, ValueError, "tree must hold 1 to 3 numbers of at least 1"),
        ({"tree": ()}, ValueError, "tree must hold"),
        ({"tree": (1, 1, 1, 1)}, ValueError, "tree must hold 1 to 3"),
        ({"tree": (VOCAB_SIZE + 1,)}, ValueError, "tree must hold"),
        ({"tree": (10, 10)}, ValueError, "at most 64 tokens"),
        ({"tree": (2, 1.5)}, TypeError, "tree must be"),
        ({"tree": 3}, TypeError, "tree must hold"),
        ({"tree": (2,), "n_draft": 2}, ValueError, "n_draft must be None or the length of tree, 1"),
        ({"tree": (2,), "n_draft": "auto"}, ValueError, "n_draft must be None"),
        ({"tree": (2,), "draft": "sample", "temperature": 1.0}, ValueError, "draft must be 'greedy' with a tree"),
    ],
    ids=str,
)
def test_bad_trees(options: dict[str, Any], error: type[Exception], message: str, prompts: list[Tensor]) -> None:
    with pytest.raises(error, match=message):
        generate(tiny(), prompts, 4, **options)


def test_heads_that_read_tokens_have_no_tree(prompts: list[Tensor]) -> None:
    with pytest.raises(ValueError, match="heads read the tokens"):
        generate(tiny(variant=READING), prompts, 4, tree=(2,))
