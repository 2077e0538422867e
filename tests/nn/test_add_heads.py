"""Heads for an existing model, and the layout of the released ones."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mtp_ext.nn.interop.add_heads import add_heads
from mtp_ext.nn.interop.convert import convert
from mtp_ext.nn.interop.paper_checkpoints import load_released, save_released
from mtp_ext.nn.variants import VARIANTS, HeadLayer, Variant
from tests.nn.conftest import ALL_VARIANTS, VOCAB_SIZE

Make = Callable[..., Any]


def test_a_kind_of_head_that_cannot_start_as_another_is_refused(
    make_model: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = HeadLayer("torch.nn:Identity", matrices=2)
    monkeypatch.setitem(VARIANTS, "new", Variant(layer, "independent"))
    with pytest.raises(ValueError, match=r"can start as head 1 of a model, got torch\.nn:Identity"):
        add_heads(make_model(1), 3, "new")


@pytest.mark.parametrize("init", ["copy_last_layer", "random"])
@pytest.mark.parametrize(
    "fields",
    [{}, {"tie_embeddings": True}, {"shared_final_norm": True}, {"variant": "replicated"}, {"variant": "shared"}],
    ids=str,
)
@pytest.mark.parametrize("variant", ALL_VARIANTS)
def test_head_one_stays_the_model(
    variant: str, fields: dict[str, Any], init: str, make_model: Make, make_batch: Make
) -> None:
    model = make_model(1, **fields)
    before = {name: p.clone() for name, p in model.named_parameters()}
    tokens, labels = make_batch(3)
    grown = add_heads(model, 3, variant, init)
    assert grown.config.variant == variant and grown.config.n_future == 3 and grown.embed.weight.dtype == torch.float64
    expected = model(tokens)
    if variant == "anticausal":
        assert not torch.allclose(grown(tokens), expected)
    else:
        torch.testing.assert_close(grown(tokens), expected, rtol=1e-12, atol=1e-12)
    grown(tokens, labels).loss.backward()
    assert all(p.grad is not None for p in grown.parameters())
    assert all(p.grad is None and torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("variant", ["parallel", "linear", "replicated"])
def test_copies_predict_as_head_one_does_and_random_heads_do_not(
    variant: str, make_model: Make, make_batch: Make
) -> None:
    model, (tokens, _) = make_model(1), make_batch(3)
    logits = add_heads(model, 3, variant).all_logits(tokens)
    assert torch.equal(logits[1], logits[0]) and torch.equal(logits[2], logits[0])
    logits = add_heads(model, 3, variant, "random").all_logits(tokens)
    assert not torch.allclose(logits[1], logits[0]) and not torch.allclose(logits[1], logits[2])


def test_copied_heads_share_no_memory(make_model: Make) -> None:
    grown = add_heads(make_model(1), 4)
    pointers = [p.data_ptr() for p in grown.parameters()]
    assert len(set(pointers)) == len(pointers)


def test_layers_are_counted(make_model: Make) -> None:
    model = make_model(1)
    assert model.config.n_layers == 3
    layers = {v: add_heads(model, 4, v).config.n_layers for v in ALL_VARIANTS}
    assert layers == dict.fromkeys(("parallel", "causal", "anticausal", "sequential_modules"), 6) | dict.fromkeys(
        ("linear", "replicated", "shared"), 3
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_future": 1}, "n_future must be an int of at least 2, got 1"),
        ({"n_future": 2, "variant": "serial"}, "variant must be one of parallel"),
        ({"n_future": 2, "init": "zeros"}, "init must be one of copy_last_layer, random, got 'zeros'"),
    ],
)
def test_errors_name_the_argument(arguments: dict[str, Any], message: str, make_model: Make) -> None:
    with pytest.raises(ValueError, match=message):
        add_heads(make_model(1), **arguments)


def test_models_that_have_heads_are_refused(make_model: Make) -> None:
    with pytest.raises(ValueError, match="model must have one head, got n_future=2"):
        add_heads(make_model(2), 3)
    with pytest.raises(ValueError, match="model must not have a linear head"):
        add_heads(make_model(1, variant="linear"), 3)


def reference_logits(w: dict[str, Tensor], params: dict[str, Any], tokens: Tensor) -> Tensor:
    """The released architecture by its own names, ``[n, B, S, V]``, in real arithmetic."""
    S, H, G = tokens.shape[1], params["n_heads"], params["n_kv_heads"]
    d = params["dim"] // H
    angle = torch.arange(S).double()[:, None] * params["rope_theta"] ** (-torch.arange(0, d, 2).double() / d)

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + params["norm_eps"]).sqrt() * weight

    def turn(x: Tensor) -> Tensor:
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.stack([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1).flatten(-2)

    def layer(x: Tensor, prefix: str) -> Tensor:
        y = norm(x, w[prefix + "attention_norm.weight"])
        q, k, v = (
            (y @ w[f"{prefix}attention.{m}.weight"].T).unflatten(-1, (-1, d)).transpose(1, 2)
            for m in ("wq", "wk", "wv")
        )
        k, v = (t.repeat_interleave(H // G, dim=1) for t in (k, v))
        scores = turn(q) @ turn(k).mT / math.sqrt(d)
        scores = scores.masked_fill(~torch.ones(S, S, dtype=torch.bool).tril(), -math.inf)
        x = x + (scores.softmax(-1) @ v).transpose(1, 2).flatten(2) @ w[prefix + "attention.wo.weight"].T
        y = norm(x, w[prefix + "ffn_norm.weight"])
        inner = F.silu(y @ w[prefix + "feed_forward.w1.weight"].T) * (y @ w[prefix + "feed_forward.w3.weight"].T)
        return x + inner @ w[prefix + "feed_forward.w2.weight"].T

    x = w["tok_embeddings.weight"][tokens]
    last = params["n_layers"] - params["n_future_tokens"]
    for i in range(last):
        x = layer(x, f"layers.{i}.")
    prefixes = [f"layers.{last}.", *(f"extra_heads.{i}." for i in range(params["n_future_tokens"] - 1))]
    return torch.stack([norm(layer(x, p), w["norm.weight"]) @ w["output.weight"].T for p in prefixes])


@pytest.mark.parametrize("n_future", [1, 4])
def test_the_released_layout_is_that_of_its_own_code(
    n_future: int, tmp_path: Path, make_model: Make, make_batch: Make
) -> None:
    model, (tokens, _) = make_model(n_future, shared_final_norm=True), make_batch(n_future)
    save_released(model, tmp_path / "released")
    params = json.loads((tmp_path / "released" / "params.json").read_text())
    weights = torch.load(tmp_path / "released" / "consolidated.pth", weights_only=True)
    assert {name.split(".")[0] for name in weights} == {
        "tok_embeddings", "layers", "norm", "output", *(["extra_heads"] if n_future > 1 else [])
    }  # fmt: skip
    torch.testing.assert_close(
        reference_logits(weights, params, tokens), model.all_logits(tokens), rtol=1e-11, atol=1e-11
    )
    again = load_released(tmp_path / "released")
    assert again.config.n_trunk_layers == 2 and again.config.d_ff == 24
    assert torch.equal(again.all_logits(tokens), model.all_logits(tokens))


@pytest.mark.parametrize(("width", "ff_dim"), [(16, 24), (4096, 11008), (384, 1024), (64, 400), (48, 1)])
def test_the_feed_forward_width_follows_from_params(width: int, ff_dim: int) -> None:
    from mtp_ext.nn.interop.paper_checkpoints import _feed_forward_params

    params = _feed_forward_params(width, ff_dim)
    hidden = int(2 * (4 * width) / 3)
    if "ffn_dim_multiplier" in params:
        hidden = int(params["ffn_dim_multiplier"] * hidden)
    multiple = params["multiple_of"]
    assert multiple * ((hidden + multiple - 1) // multiple) == ff_dim


def test_models_that_the_layout_cannot_hold(tmp_path: Path, make_model: Make, make_batch: Make) -> None:
    with pytest.raises(ValueError, match="must be of the parallel variant"):
        save_released(make_model(2, variant="causal"), tmp_path)
    with pytest.raises(ValueError, match="must be of the parallel variant, with one unembedding"):
        save_released(convert(make_model(2), replicate_unembedding=True), tmp_path)
    with pytest.raises(ValueError, match="one final norm for all heads"):
        save_released(make_model(2), tmp_path)
    tied, (tokens, _) = make_model(2, tie_embeddings=True, shared_final_norm=True), make_batch(2)
    save_released(tied, tmp_path)
    assert torch.equal(load_released(tmp_path).all_logits(tokens), tied.all_logits(tokens))


def test_damaged_checkpoints_are_named(tmp_path: Path, make_model: Make) -> None:
    with pytest.raises(ValueError, match=r"expected one file consolidated\*\.pth"):
        load_released(tmp_path)
    save_released(make_model(2, shared_final_norm=True), tmp_path)
    weights = torch.load(tmp_path / "consolidated.pth", weights_only=True)
    for change, message in (
        ({"extra_heads.0.attention.wq.weight": None}, "weights lack 'extra_heads.0.attention.wq.weight'"),
        ({"extra_heads.1.attention.wq.weight": torch.zeros(1)}, "weights hold 'extra_heads.1.attention.wq.weight'"),
        ({"layers.0.attention.wo.weight": torch.zeros(3, 3)}, "does not fit the weights"),
    ):
        changed = {name: value for name, value in (weights | change).items() if value is not None}
        torch.save(changed, tmp_path / "consolidated.pth")
        with pytest.raises(ValueError, match=message):
            load_released(tmp_path)
    torch.save(weights | {"rope.freqs": torch.zeros(2)}, tmp_path / "consolidated.pth")
    assert load_released(tmp_path, dtype=torch.bfloat16).embed.weight.dtype == torch.bfloat16
    (tmp_path / "params.json").write_text("{}")
    with pytest.raises(ValueError, match="lack 'n_layers'"):
        load_released(tmp_path)
    assert VOCAB_SIZE == weights["output.weight"].shape[0]
