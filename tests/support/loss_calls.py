"""Drawn calls of the fused losses, and their comparison with the float64 reference."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from mtp_ext.ops import MultiTokenLoss, linear_cross_entropy, multi_token_cross_entropy, reference

DIFFERENTIABLE = ("hidden", "weight", "bias", "head_weights")
FLOATING = (*DIFFERENTIABLE, "class_weights", "token_weights", "normalizer")
OF_CLASSES = ("weight", "bias", "class_weights")  # what a vocabulary shard holds a part of
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Arguments that bound memory or work and leave the value alone; the reference does not have them.
BOUNDS = ("chunk_rows", "workspace_bytes", "max_valid")


@dataclass
class Call:
    """A call of ``multi_token_cross_entropy`` (``heads``) or ``linear_cross_entropy``, in float64."""

    dtype: torch.dtype
    tensors: dict[str, Tensor]  # hidden, weight, labels, and optional ones
    options: dict[str, Any]
    heads: bool
    gradient_seed: int = 0
    wanted: tuple[str, ...] = DIFFERENTIABLE
    stacked: bool = True
    strided: bool = False


def make_generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


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
        tensors["class_weights"] = (torch.rand(vocab, generator=g) + 0.25).double()
    if has["token_weights"]:
        weights = torch.rand(label_shape, generator=g).double()
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
        tensors["head_weights"] = torch.rand(n, generator=g).double()
    options["normalizer"] = draw(st.sampled_from(["per_head", "per_head", 17, 3.5]))
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


@dataclass
class Shard:
    """The classes that a rank holds of a vocabulary sharded over ``group``."""

    classes: slice
    group: torch.distributed.ProcessGroup


def arguments(call: Call, dtype: torch.dtype, *, ours: bool, shard: Shard | None = None) -> dict[str, Any]:
    """Keyword arguments with inputs that hold the same numbers in every dtype: rounded to the call's, then widened."""
    made: dict[str, Any] = {}
    for name, value in call.tensors.items():
        if shard is not None and name in OF_CLASSES:
            value = value[..., shard.classes, :] if name == "weight" else value[shard.classes]
        if name in ("hidden", "weight", "bias"):
            value = value.to(call.dtype).to(dtype)
        elif name in FLOATING:
            value = value.to(torch.float64 if dtype == torch.float64 and not ours else torch.float32)
        if call.strided and ours and value.dim() > 1:
            value = value.transpose(-1, -2).contiguous().transpose(-1, -2)
        made[name] = value.clone(memory_format=torch.preserve_format).requires_grad_(
            name in call.wanted and value.is_floating_point()
        )
    if ours and call.heads and not call.stacked:
        made["hidden"] = [h.detach().requires_grad_(h.requires_grad) for h in made["hidden"]]
    if not call.heads:
        made["targets"] = made.pop("labels")
    options = dict(call.options)
    if not ours:
        for name in BOUNDS:
            options.pop(name, None)
    if shard is not None:
        options["group"] = shard.group
    return made | options


@dataclass
class Results:
    values: dict[str, Tensor]
    exact: dict[str, Tensor]  # what must be equal whatever the dtype
    grads: dict[str, Tensor]


def run(call: Call, dtype: torch.dtype, *, ours: bool, shard: Shard | None = None) -> Results:
    """Values and gradients of the fused loss, or of the reference, for fixed incoming gradients."""
    function: Callable[..., Any]
    if ours:
        function = multi_token_cross_entropy if call.heads else linear_cross_entropy
    else:
        function = reference.multi_token_cross_entropy if call.heads else reference.linear_cross_entropy
    made = arguments(call, dtype, ours=ours, shard=shard)
    out = function(**made)
    values, exact = named_outputs(out)
    g = make_generator(call.gradient_seed)
    total = sum(
        (x * torch.rand(x.shape, generator=g, dtype=torch.float64).to(x.dtype)).sum()
        for name, x in values.items()
        if name in ("loss", "lse")
    )
    assert isinstance(total, Tensor)
    leaves = {name: made[name] for name in DIFFERENTIABLE if name in made}
    flat = {name: x if isinstance(x, list) else [x] for name, x in leaves.items()}
    wanted = [x for xs in flat.values() for x in xs if x.requires_grad]
    # A reference whose heads are all detached has no graph: its gradients are zeros, as ours.
    found = iter(torch.autograd.grad(total, wanted, allow_unused=True) if total.requires_grad else [None] * len(wanted))
    grads: dict[str, Tensor] = {}
    for name, xs in flat.items():
        if not xs[0].requires_grad:
            continue
        parts = [torch.zeros_like(x) if g is None else g for x in xs for g in [next(found)]]
        grads[name] = torch.stack(parts) if isinstance(leaves[name], list) else parts[0]
    return Results(values, exact, grads)


def named_outputs(out: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    if isinstance(out, MultiTokenLoss):
        return {"loss": out.loss, "head_loss": out.head_loss}, {"n_valid": out.n_valid}
    if isinstance(out, tuple):
        return {"loss": out[0], "lse": out[1]}, {}
    return {"loss": out}, {}


def assert_no_worse_than_eager(call: Call, ours: Results | None = None) -> None:
    """Every value and gradient errs at most twice as much as eager torch in the same dtype, plus a floor.

    Args:
        call: The call.
        ours: Its results, where they were not computed here.
    """
    exact, eager = run(call, torch.float64, ours=False), run(call, call.dtype, ours=False)
    ours = ours or run(call, call.dtype, ours=True)
    assert {k: v.tolist() for k, v in ours.exact.items()} == {k: v.tolist() for k, v in exact.exact.items()}
    assert ours.grads.keys() == exact.grads.keys()
    for kind in ("values", "grads"):
        for name, expected in getattr(exact, kind).items():
            got = getattr(ours, kind)[name]
            assert got.shape == expected.shape, name
            error = (got.detach().double() - expected.detach()).abs()
            eager_error = (getattr(eager, kind)[name].detach().double() - expected.detach()).abs()
            assert bool(torch.isfinite(got).all()), f"{name} is not finite"
            bound = 2 * largest(eager_error) + floor(got.dtype, largest(expected.detach().abs()))
            assert largest(error) <= bound, f"{name}: error {largest(error):.3g} > {bound:.3g}"


def largest(x: Tensor) -> float:
    return float(x.amax()) if x.numel() else 0.0


def floor(dtype: torch.dtype, scale: float) -> float:
    """One rounding to the result's dtype, and the summation order of float32 (float64)."""
    accumulate = 1e-12 if dtype == torch.float64 else 2e-6
    return (torch.finfo(dtype).eps / 2 + accumulate) * scale + accumulate
