"""Conversion between equivalent architectures: what it refuses, and that copies are copies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from mtp_ext.nn.interop.convert import convert

Make = Callable[..., Any]


@pytest.mark.parametrize("pair", [("parallel", "causal"), ("causal", "anticausal"), ("anticausal", "parallel")])
def test_one_head_is_the_same_in_every_order(pair: tuple[str, str], make_model: Make, make_batch: Make) -> None:
    tokens, _ = make_batch(1)
    model = make_model(1, variant=pair[0])
    converted = convert(model, variant=pair[1])
    assert converted.config.variant == pair[1]
    assert torch.equal(converted.all_logits(tokens), model.all_logits(tokens))


def test_the_copy_has_weights_of_its_own(make_model: Make, make_batch: Make) -> None:
    model = make_model(2, variant="shared").eval()
    copy = convert(model, variant="replicated")
    assert copy.config.variant == "replicated" and not copy.training
    tokens, _ = make_batch(2)
    before = copy.all_logits(tokens)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert torch.equal(copy.all_logits(tokens), before)


def test_converting_draws_no_random_number(make_model: Make) -> None:
    model = make_model(2)
    state = torch.get_rng_state()
    convert(model, replicate_unembedding=True)
    assert torch.equal(torch.get_rng_state(), state)


def test_unequal_copies_are_refused(make_model: Make) -> None:
    model = make_model(3, variant="replicated", shared_final_norm=True)
    with pytest.raises(ValueError, match="model must have equal unembeddings to share one, but that of head 2"):
        convert(model, variant="shared")
    model = convert(make_model(3, variant="shared"), variant="replicated")
    with torch.no_grad():
        model.heads.head(3).norm.weight[0] += 1
    with pytest.raises(ValueError, match="equal final norms to share one, but that of head 3"):
        convert(model, variant="shared")


def test_a_final_norm_is_shared_while_copies_are_equal(make_model: Make, make_batch: Make) -> None:
    tokens, _ = make_batch(2)
    model = make_model(2, shared_final_norm=True)
    own = convert(model, shared_final_norm=False)
    assert not own.config.one_final_norm and own.heads.norm is None
    back = convert(own, shared_final_norm=True)
    for other in (own, back):
        assert torch.equal(other.all_logits(tokens), model.all_logits(tokens))
    with torch.no_grad():
        own.heads.head(2).norm.weight[0] += 1
    with pytest.raises(ValueError, match="model must have equal final norms to share one, but that of head 2"):
        convert(own, shared_final_norm=True)


@pytest.mark.parametrize("pair", [("parallel", "causal"), ("causal", "anticausal"), ("linear", "parallel")])
def test_architectures_that_differ_are_refused(pair: tuple[str, str], make_model: Make) -> None:
    with pytest.raises(ValueError, match=f"variant must be equivalent to '{pair[0]}' with n_future=2, got '{pair[1]}'"):
        convert(make_model(2, variant=pair[0]), variant=pair[1])


def test_an_unknown_variant_is_named(make_model: Make) -> None:
    with pytest.raises(ValueError, match="variant must be one of parallel, linear"):
        convert(make_model(2), variant="serial")
