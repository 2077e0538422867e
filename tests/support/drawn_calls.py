"""Strategies that draw any call of the fused losses: shapes, dtypes, options, masks, wanted gradients."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from tests.support.loss_calls import DIFFERENTIABLE, DTYPES, Call, make_generator


@st.composite
def sizes(draw: st.DrawFn) -> tuple[int, int]:
    """``(D, V)``: mostly small, sometimes past a block of the row kernel, rarely of one class."""
    vocab = draw(st.one_of(st.integers(1, 70), st.sampled_from([1, 2, 1023, 1024, 1025, 2050])))
    return draw(st.integers(1, 19)), vocab


@st.composite
def row_options(draw: st.DrawFn) -> dict[str, Any]:
    """The scalar options, each off more often than on."""

    def sometimes(values: list[Any], default: Any) -> Any:
        return draw(st.sampled_from([default, default, *values]))

    return {
        "label_smoothing": sometimes([0.1, 1.0], 0.0),
        "z_loss": sometimes([1e-3, 0.1], 0.0),
        "softcap": sometimes([2.0, 30.0], None),
        "logit_scale": sometimes([0.25, -1.5], 1.0),
        "ignore_index": sometimes([0, 7], -100),
        "chunk_rows": sometimes([1, 3, 64], None),
        "workspace_bytes": sometimes([1, 10_000], None),
        "reduction": draw(st.sampled_from(["mean", "sum", "none"])),
    }


def draw_targets(
    g: torch.Generator, shape: tuple[int, ...], vocab: int, options: dict[str, Any], share: float
) -> Tensor:
    targets = torch.randint(vocab, shape, generator=g)
    ignored = torch.rand(shape, generator=g) < share
    return torch.where(ignored, options["ignore_index"], targets)


@st.composite
def calls(draw: st.DrawFn) -> Call:
    """Any call: shapes, dtypes, options, masks and which gradients are wanted."""
    g = make_generator(draw(st.integers(0, 2**31)))
    heads, dtype, options = draw(st.booleans()), draw(st.sampled_from(DTYPES)), draw(row_options())
    width, vocab = draw(sizes())
    n = draw(st.integers(1, 4)) if heads else 1
    batch, seq = draw(st.integers(0, 3)), draw(st.integers(0, 9))
    share = draw(st.sampled_from([0.0, 0.3, 1.0]))
    has = {name: draw(st.sampled_from([False, False, True])) for name in ("bias", "class_weights", "token_weights")}
    label_shape = (batch, seq + draw(st.integers(0, n + 1))) if heads else (batch, seq)
    replicated = heads and draw(st.sampled_from([False, False, True]))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    tensors = {
        "hidden": normal(n, batch, seq, width) if heads else normal(batch, seq, width),
        "weight": normal(n, vocab, width) if replicated else normal(vocab, width),
        "labels": draw_targets(g, label_shape, vocab, options, share),
    }
    if draw(st.booleans()):
        tensors["labels"] = tensors["labels"].int()
    if has["bias"]:
        tensors["bias"] = normal(vocab)
    if has["class_weights"]:
        tensors["class_weights"] = torch.rand(vocab, generator=g, dtype=torch.float64) + 0.25
    if has["token_weights"]:
        weights = torch.rand(label_shape, generator=g, dtype=torch.float64)
        tensors["token_weights"] = torch.where(torch.rand(label_shape, generator=g) < 0.3, 0.0, weights)
    if heads:
        draw_head_arguments(draw, g, tensors, options, n)
    else:
        options["return_lse"] = draw(st.booleans())
    if draw(st.booleans()):
        counts = valid_counts(tensors, options["ignore_index"], n, seq, first_shift=int(heads))
        counts = [count + draw(st.sampled_from([0, 1, 100])) for count in counts]
        options["max_valid"] = counts if heads else counts[0]
    wanted = draw(st.sets(st.sampled_from(DIFFERENTIABLE), min_size=1))
    return Call(
        dtype,
        tensors,
        options,
        heads,
        gradient_seed=draw(st.integers(0, 100)),
        wanted=tuple(name for name in DIFFERENTIABLE if name in wanted),
        stacked=draw(st.booleans()),
        strided=draw(st.booleans()),
    )


@st.composite
def plain_calls(draw: st.DrawFn) -> Call:
    """Calls of ``linear_cross_entropy`` without options, which take a way of their own."""
    g = make_generator(draw(st.integers(0, 2**31)))
    (width, vocab), shape = draw(sizes()), tuple(draw(st.lists(st.integers(0, 9), max_size=3)))
    options = {
        "reduction": draw(st.sampled_from(["mean", "sum"])),
        "ignore_index": draw(st.sampled_from([-100, -100, 0])),
    }
    tensors = {
        "hidden": torch.randn(*shape, width, generator=g, dtype=torch.float64),
        "weight": torch.randn(vocab, width, generator=g, dtype=torch.float64),
        "labels": draw_targets(g, shape, vocab, options, draw(st.sampled_from([0.0, 0.3, 1.0]))),
    }
    if draw(st.booleans()):
        tensors["labels"] = tensors["labels"].int()
    wanted = draw(st.sampled_from([("hidden",), ("weight",), ("hidden", "weight")]))
    dtype = draw(st.sampled_from([torch.float64, torch.float32]))
    return Call(dtype, tensors, options, heads=False, wanted=wanted, strided=draw(st.booleans()))


def draw_head_arguments(
    draw: st.DrawFn, g: torch.Generator, tensors: dict[str, Tensor], options: dict[str, Any], n: int
) -> None:
    labels = tensors["labels"]
    if draw(st.booleans()):
        tensors["document_ids"] = torch.randint(0, 2, labels.shape, generator=g).cumsum(1)
    if draw(st.booleans()):
        tensors["head_weights"] = torch.rand(n, generator=g, dtype=torch.float64)
    options["normalizer"] = draw(st.sampled_from(["per_head", "per_head", 17, 3.7]))
    options["detach_weight"] = draw(st.sampled_from([(), (), (1,), (n,)]))


def valid_counts(
    tensors: dict[str, Tensor], ignore_index: int, n_heads: int, seq_len: int, first_shift: int
) -> list[int]:
    """How many targets of each head count, one by one."""
    labels = tensors["labels"]
    counts = [0] * n_heads
    for k, b, s in itertools.product(range(n_heads), range(len(labels)), range(seq_len)):
        j = s + first_shift + k
        if j >= labels.shape[1] or labels[b, j] == ignore_index:
            continue
        if "token_weights" in tensors and tensors["token_weights"][b, j] == 0:
            continue
        ids = tensors.get("document_ids")
        counts[k] += ids is None or bool(ids[b, s] == ids[b, j])
    return counts
