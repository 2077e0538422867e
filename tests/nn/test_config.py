from __future__ import annotations

import json
from typing import Any

import pytest

from mtp_ext.nn import MTPConfig, MTPModel

SHAPE: dict[str, Any] = {"vocab_size": 100, "d_model": 32, "n_layers": 6, "n_attn_heads": 4}


def test_the_paper_counts_heads_among_the_layers() -> None:
    assert MTPConfig(**SHAPE, n_future=1).n_trunk_layers == 5
    assert MTPConfig(**SHAPE, n_future=4).n_trunk_layers == 2
    assert MTPConfig(**SHAPE, n_future=6).n_trunk_layers == 0
    assert MTPConfig(**SHAPE, n_future=4, variant="causal").n_trunk_layers == 2
    assert MTPConfig(**SHAPE, n_future=4, variant="linear").n_trunk_layers == 6
    assert MTPConfig(**SHAPE, n_future=8, variant="replicated").n_trunk_layers == 6


@pytest.mark.parametrize(
    ("name", "d_model", "n_layers", "n_attn_heads", "millions"),
    [
        ("1M", 128, 5, 4, 1),
        ("3M", 256, 4, 8, 3),
        ("10M", 384, 6, 8, 10),
        ("30M", 512, 10, 8, 30),
        ("100M", 768, 14, 12, 100),
        ("300M", 1024, 25, 16, 300),
        ("1B", 1536, 36, 24, 1000),
        ("0.3B", 1024, 18, 16, 300),
        ("0.6B", 1280, 27, 20, 600),
        ("1.3B", 2048, 24, 16, 1300),
        ("3B", 2560, 36, 20, 3000),
        ("6.7B", 4096, 32, 32, 6700),
        ("13B", 5120, 40, 40, 13000),
    ],
)
def test_presets_have_the_shapes_and_sizes_of_the_paper(
    name: str, d_model: int, n_layers: int, n_attn_heads: int, millions: int
) -> None:
    config = MTPConfig.preset(name, vocab_size=256, n_future=2)
    assert (config.d_model, config.n_layers, config.n_attn_heads) == (d_model, n_layers, n_attn_heads)
    assert (config.vocab_size, config.n_future, config.variant) == (256, 2, "parallel")
    # Nominal sizes: the 0.3B model lies furthest off, without its 32k embeddings.
    assert 0.7 < config.parameter_counts()["total"] / (millions * 1e6) < 1.3


def test_presets_take_overrides() -> None:
    config = MTPConfig.preset("1M", vocab_size=10, variant="causal", n_layers=9, tie_embeddings=True)
    assert (config.n_layers, config.variant, config.tie_embeddings, config.n_future) == (9, "causal", True, 4)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"tie_embeddings": True},
        {"shared_final_norm": True, "n_kv_heads": 2},
        {"d_ff": 50, "n_future": 6},
    ],
)
def test_parameter_counts_are_those_of_the_model(fields: dict[str, Any]) -> None:
    config = MTPConfig(**(SHAPE | fields))
    model, counts = MTPModel(config), config.parameter_counts()
    for part in ("embed", "trunk", "heads"):
        assert counts[part] == sum(p.numel() for p in model.get_submodule(part).parameters()), part
    assert counts["total"] == sum(p.numel() for p in model.parameters())


def test_the_default_feed_forward_width_keeps_the_layer_at_12_d_squared() -> None:
    assert MTPConfig.preset("1B", vocab_size=10).ff_dim == 4096
    assert MTPConfig.preset("1M", vocab_size=10).ff_dim == 384


def test_dict_round_trip_through_json() -> None:
    config = MTPConfig(**SHAPE, n_kv_heads=2, rope_theta=5e5, residual_init_scale=0.0)
    assert MTPConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_from_dict_refuses_unknown_and_missing_fields() -> None:
    with pytest.raises(ValueError, match="unknown model configuration field 'n_heads'"):
        MTPConfig.from_dict(SHAPE | {"n_heads": 3})
    with pytest.raises(ValueError, match="lacks the field 'd_model'"):
        MTPConfig.from_dict({"vocab_size": 3})


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"vocab_size": 0}, ValueError, "vocab_size must be at least 1, got 0"),
        ({"d_model": 32.0}, TypeError, "d_model must be an int, got 32.0"),
        ({"n_future": True}, TypeError, "n_future must be an int, got True"),
        ({"n_kv_heads": 0}, ValueError, "n_kv_heads must be at least 1"),
        ({"n_kv_heads": 3}, ValueError, "n_attn_heads must be a multiple of n_kv_heads"),
        ({"n_attn_heads": 5}, ValueError, "d_model must be a multiple of n_attn_heads"),
        ({"n_attn_heads": 32}, ValueError, "must be even"),
        ({"n_future": 7}, ValueError, "n_layers=6, n_future=7"),
        ({"variant": "serial"}, ValueError, "variant must be one of parallel, linear, replicated, causal, anticausal"),
        ({"tie_embeddings": 1}, TypeError, "tie_embeddings must be True or False"),
        ({"rope_theta": 0.0}, ValueError, "rope_theta must be finite and positive"),
        ({"norm_eps": float("nan")}, ValueError, "norm_eps must be finite"),
        ({"init_std": -1.0}, ValueError, "init_std must be finite and not negative"),
        ({"init_std": "small"}, TypeError, "init_std must be a number"),
    ],
)
def test_errors_name_the_field(fields: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        MTPConfig(**(SHAPE | fields))


def test_unknown_preset() -> None:
    with pytest.raises(ValueError, match="preset must be one of 1M, 3M"):
        MTPConfig.preset("2M", vocab_size=10)
