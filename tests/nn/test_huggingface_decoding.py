"""Models of transformers decode with drafts from their heads: the tokens of their own ``generate``."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from mtp_ext.generate import generate
from mtp_ext.nn.huggingface import from_huggingface
from tests.nn.conftest import VOCAB_SIZE
from tests.nn.test_huggingface import MODELS, VARIANTS, make_lm, transformers

pytestmark = pytest.mark.slow
N_NEW = 14


def prompts(lengths: tuple[int, ...]) -> list[Tensor]:
    g = torch.Generator().manual_seed(3)
    return [torch.randint(VOCAB_SIZE, (length,), generator=g) for length in lengths]


def of_transformers(lm: Any, rows: list[Tensor]) -> list[list[int]]:
    """Its own greedy decoding, row by row."""
    found = []
    for row in rows:
        mask = torch.ones_like(row[None])
        whole = lm.generate(row[None], attention_mask=mask, max_new_tokens=N_NEW, do_sample=False, pad_token_id=0)
        found.append(whole[0, len(row) :].tolist())
    return found


@pytest.mark.parametrize(
    ("name", "variant"),
    [(name, v) for name in MODELS for v in VARIANTS if v == "parallel" or (name == "Llama" and v != "anticausal")],
)
def test_greedy_tokens_are_those_of_transformers(name: str, variant: str) -> None:
    """With rows of different lengths, sliding windows and head 1 as the model's own last layer."""
    lm = make_lm(name)
    rows = prompts((3, 9, 1))
    expected = of_transformers(lm, rows)
    model = from_huggingface(lm, 3, variant).eval()
    for n_draft in (0, 1, 2):
        output = generate(model, rows, N_NEW, n_draft=n_draft)
        assert [x.tolist() for x in output.tokens] == expected
        one = generate(model, rows[1][None], N_NEW, n_draft=n_draft)
        assert one.tokens[0].tolist() == expected[1]


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v != "shared"])  # whose heads are one
def test_trained_heads_draft_tokens_that_are_accepted(variant: str) -> None:
    lm = make_lm("Llama")
    model = from_huggingface(lm, 3, variant, init="random")
    text = torch.arange(40)[None] % 7
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        model(text, text).loss.backward()
        optimizer.step()
    model.eval()
    plain = generate(model, text[:, :10], 21, n_draft=0)
    drafted = generate(model, text[:, :10], 21)
    assert torch.equal(plain.tokens[0], drafted.tokens[0])
    assert drafted.stats.tokens_per_forward > 2


def test_anticausal_heads_draft_without_changing_the_tokens() -> None:
    model = from_huggingface(make_lm("Gemma2"), 3, "anticausal").eval()
    rows = prompts((4, 2))
    expected = [x.tolist() for x in generate(model, rows, N_NEW, n_draft=0).tokens]
    assert [x.tolist() for x in generate(model, rows, N_NEW).tokens] == expected


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_kinds_of_attention(attention: str) -> None:
    lm = make_lm("Mistral", attn_implementation=attention)
    rows = prompts((2, 7))
    model = from_huggingface(lm, 3).eval()
    assert [x.tolist() for x in generate(model, rows, N_NEW).tokens] == of_transformers(lm, rows)


def test_what_cannot_decode_is_refused() -> None:
    lm = make_lm("Llama")
    model = from_huggingface(lm, 2).eval()
    with pytest.raises(ValueError, match="max_seq_len=64"):
        generate(model, prompts((60,)), 10)
    with pytest.raises(ValueError, match="tokens"):
        generate(model, [torch.tensor([VOCAB_SIZE])], 2)
    other = copy.deepcopy(lm)
    other.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="attn_implementation='sdpa' or 'eager'"):
        generate(from_huggingface(other, 2).eval(), prompts((3, 4)), 4)


def test_the_language_model_keeps_its_own_cache() -> None:
    """Decoding with heads leaves nothing behind in the model that lends its layers."""
    lm = make_lm("Llama")
    rows = prompts((5,))
    before = of_transformers(lm, rows)
    generate(from_huggingface(lm, 3).eval(), rows, N_NEW)
    assert of_transformers(lm, rows) == before and transformers is not None
