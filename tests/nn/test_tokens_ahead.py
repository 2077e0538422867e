"""Heads that read tokens ahead of their position: from labels where they hold them, else as given, never made up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from mtp_ext.nn import MTPModel
from mtp_ext.nn.schedules import tokens_ahead as module
from tests.nn.conftest import SCHEDULES, VOCAB_SIZE

Make = Callable[..., Any]
N, S = 3, 12
REFUSED = r"labels must hold the tokens that heads read, got ignore_index=-100 before the target at index \[1, 13\]"
# Positions of a row whose labels are masked, and whether a target then depends on a token that labels do not tell.
MASKS = {
    "the first token ahead": ([12], True),
    "both tokens ahead": ([12, 13], True),
    "the second token ahead": ([13], True),
    "all but the last": ([*range(14)], True),
    "the end": ([12, 13, 14], False),
    "the last target": ([14], False),
    "a prompt": ([*range(9)], False),
    "within the row": ([4, 11], False),
}


def gradients(model: MTPModel, *arguments: Any, **keywords: Any) -> list[Tensor]:
    model.zero_grad()
    loss = model(*arguments, **keywords).loss
    loss.backward()
    return [loss.detach(), *(p.grad if p.grad is not None else torch.zeros_like(p) for p in model.parameters())]


def masked(labels: Tensor, positions: Sequence[int], value: int = -100) -> Tensor:
    labels = labels.clone()
    labels[1, list(positions)] = value
    return labels


@pytest.fixture
def model(make_model: Make) -> MTPModel:
    made: MTPModel = make_model(N, variant="sequential_modules")
    return made


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("mask", MASKS)
def test_masked_labels_are_read_as_given_or_refused(
    mask: str, schedule: str, model: MTPModel, make_batch: Make
) -> None:
    """The oracle reads unmasked labels, and leaves the same targets out by a token weight of 0."""
    positions, is_refused = MASKS[mask]
    tokens, whole = make_batch(N)
    labels = masked(whole, positions)
    weights = (labels != -100).double()
    expected = gradients(model, tokens, whole, token_weights=weights, schedule="autograd")
    calls: list[dict[str, Any]] = [{"tokens_ahead": whole}, {"tokens_ahead": whole[:, : S + N - 1].int()}]
    if is_refused:
        with pytest.raises(ValueError, match="labels must hold the tokens that heads read"):
            model(tokens, labels, schedule=schedule)
    else:
        calls.append({})
    for keywords in calls:
        found = gradients(model, tokens, labels, schedule=schedule, **keywords)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("ignore_index", [5, -1, VOCAB_SIZE])
def test_any_ignore_index(ignore_index: int, model: MTPModel, make_batch: Make) -> None:
    tokens, whole = make_batch(N)
    whole = whole.where(whole != ignore_index, 6)
    tokens = whole[:, :S]
    labels = masked(whole, [12], ignore_index)
    with pytest.raises(ValueError, match=REFUSED.replace("-100", str(ignore_index))):
        model(tokens, labels, ignore_index=ignore_index)
    expected = gradients(model, tokens, masked(whole, [12]), tokens_ahead=whole)
    found = gradients(model, tokens, labels, ignore_index=ignore_index, tokens_ahead=whole)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_what_no_target_depends_on_is_not_asked_for(model: MTPModel, make_batch: Make) -> None:
    """Heads of weight 0, targets of another document (whose first label is often masked), labels without the end."""
    tokens, whole = make_batch(N)
    labels = masked(whole, [12])
    expected = gradients(model, tokens, labels, tokens_ahead=whole, head_weights=[1.0, 0.0, 0.0])
    found = gradients(model, tokens, labels, head_weights=[1.0, 0.0, 0.0])
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    documents = (torch.arange(S + N) >= S).long().expand(2, -1)
    expected = gradients(model, tokens, labels, documents, tokens_ahead=whole)
    torch.testing.assert_close(gradients(model, tokens, labels, documents), expected, rtol=1e-10, atol=1e-12)
    with pytest.raises(ValueError, match=REFUSED):
        model(tokens, labels, torch.zeros_like(documents))
    for width in (S, S + 1):
        expected = gradients(model, tokens, whole[:, :width])
        found = gradients(model, tokens, labels[:, :width], tokens_ahead=whole)
        count = model(tokens, labels[:, :width]).n_valid
        assert torch.equal(count, model(tokens, labels[:, :width], tokens_ahead=whole).n_valid)
        if width == S:
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_heads_alone_read_labels_too(model: MTPModel, make_batch: Make) -> None:
    tokens, whole = make_batch(N)
    hidden = model.trunk(tokens).detach()
    torch.testing.assert_close(model.heads(hidden, whole).loss, model(tokens, whole).loss)
    for positions in ([3], [*range(6)], [11], [12]):  # a prompt, whose tokens labels do not tell
        labels = masked(whole, positions)
        with pytest.raises(ValueError, match="labels must hold the tokens that heads read"):
            model.heads(hidden, labels)
        expected = model(tokens, labels, tokens_ahead=whole).loss
        torch.testing.assert_close(model.heads(hidden, labels, tokens_ahead=whole).loss, expected)
    first = masked(whole, [0])  # which no head reads
    torch.testing.assert_close(model.heads(hidden, first).loss, model(tokens, first).loss)


def test_where_the_host_cannot_read_a_lost_target_is_an_invalid_one(
    model: MTPModel, make_batch: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which makes the loss NaN on a GPU, and is an error of the loss here."""
    tokens, whole = make_batch(N)
    monkeypatch.setattr(module, "can_read", lambda x: False)
    torch.testing.assert_close(model(tokens, masked(whole, [12, 13, 14])).loss.isfinite(), torch.tensor(True))
    for ignore_index, invalid in ((-100, -1), (-1, -2)):
        labels = masked(whole, [12], ignore_index)
        with pytest.raises(ValueError, match=rf"targets must be in .* got {invalid} at index \[1, 13\]"):
            model(tokens, labels, ignore_index=ignore_index)


def test_labels_out_of_range_are_the_losss_to_name(model: MTPModel, make_batch: Make) -> None:
    tokens, whole = make_batch(N)
    for schedule in SCHEDULES:
        for value in (VOCAB_SIZE, -1, 10**6):
            with pytest.raises(ValueError, match=rf"targets must be in \[0, 37\) .* got {value} at index \[1, 12\]"):
                model(tokens, masked(whole, [12], value), schedule=schedule)


@pytest.mark.parametrize("variant", ["sequential_modules", "parallel"])
def test_wrong_tokens_ahead_are_named(variant: str, make_model: Make, make_batch: Make) -> None:
    model = make_model(N, variant=variant)
    tokens, whole = make_batch(N)
    for given, error, message in (
        (whole.double(), TypeError, "tokens_ahead must be .* of dtype int64 or int32"),
        (whole.tolist(), TypeError, "tokens_ahead must be a tensor"),
        (whole[:, :13], ValueError, r"tokens_ahead must be \[B, S''\] with B = 2 and S'' >= 14"),
        (whole[:1], ValueError, "tokens_ahead must be .* with B = 2"),
        (whole[0], ValueError, r"tokens_ahead must be \[B, S''\]"),
    ):
        with pytest.raises(error, match=message):
            model(tokens, whole, tokens_ahead=given)
    if variant == "parallel":
        torch.testing.assert_close(model(tokens, whole, tokens_ahead=whole).loss, model(tokens, whole).loss)
        return
    for given, message in (
        (whole.roll(1, 1), "tokens_ahead must begin with tokens"),
        (masked(whole, [12]), r"tokens_ahead must be in \[0, 37\), got values from -100 to"),
        (masked(whole, [13], VOCAB_SIZE), r"tokens_ahead must be in \[0, 37\)"),
    ):
        with pytest.raises(ValueError, match=message):
            model(tokens, whole, tokens_ahead=given)
