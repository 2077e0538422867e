"""Llama-shaped models of transformers, converted: the same logits, or a refusal."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from mtp_ext.nn import add_heads
from mtp_ext.nn.interop.llama import from_llama
from tests.nn.conftest import VOCAB_SIZE
from tests.nn.test_huggingface import make_lm

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
TOKENS = torch.arange(24).view(2, 12)
WIDE: dict[str, Any] = {"sliding_window": None}
SHAPES: dict[str, dict[str, Any]] = {
    "grouped queries": {},
    "one key": {"num_key_value_heads": 1},
    "rotations": {"rope_parameters": {"rope_type": "default", "rope_theta": 123.0}},
    "epsilon": {"rms_norm_eps": 0.1},
    "one layer": {"num_hidden_layers": 1},
}


@pytest.mark.parametrize("name", ["Llama", "Llama tied", "Mistral"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_logits_are_the_same(shape: str, name: str) -> None:
    lm = make_lm(name, **(SHAPES[shape] | (WIDE if name == "Mistral" else {})))
    expected = lm(input_ids=TOKENS).logits
    model = from_llama(lm, max_seq_len=32)
    error = (model(TOKENS) - expected).abs().max() / expected.abs().max()
    assert error < 100 * 2**-24  # its norms, softmax and rotations are float32
    assert not model.training and (model.unembed.weight is model.embed.weight) == (name == "Llama tied")
    assert {p.data_ptr() for p in model.parameters()}.isdisjoint(p.data_ptr() for p in lm.parameters())
    torch.testing.assert_close(add_heads(model, 3)(TOKENS), model(TOKENS))
    labels = torch.randint(VOCAB_SIZE, (2, 13))
    model.train()(labels[:, :12], labels).loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def adapted(lm: Any) -> Any:
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["q_proj"]), lm)
    return lm


def without_a_layer(lm: Any) -> Any:
    lm.model.layers = nn.ModuleList(lm.model.layers[:-1])
    return lm


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: make_lm("Qwen2"), "model must have model_type llama or mistral to be converted, got 'qwen2'"),
        (lambda: make_lm("Gemma"), "model must have model_type llama or mistral to be converted, got 'gemma'"),
        (lambda: make_lm("Llama", hidden_act="gelu"), "model must have hidden_act silu"),
        (lambda: make_lm("Llama", head_dim=8), "model must have head_dim None or 4 to be converted, got 8"),
        (
            lambda: make_lm("Llama", rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}),
            "model must have rope_type default to be converted, got 'linear'",
        ),
        (lambda: make_lm("Mistral"), "max_seq_len must be at most the model's sliding window 5, got 32"),
        (lambda: make_lm("Llama", attention_bias=True), r"weights hold 'layers\.0\.attention\.w.\.bias'"),
        (lambda: make_lm("Llama", mlp_bias=True), r"weights hold 'layers\.0\.feed_forward\.w.\.bias'"),
        (lambda: adapted(make_lm("Llama")), r"weights lack 'layers\.0\.attention\.wq\.weight'"),
        (lambda: without_a_layer(make_lm("Llama")), r"weights lack 'layers\.2\.attention_norm\.weight'"),
    ],
)
def test_what_has_no_equivalent_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_llama(make(), max_seq_len=32)
