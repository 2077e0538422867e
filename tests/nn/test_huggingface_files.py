"""Saved language models with heads: what loading would not give back is not saved, heads load beside their own base."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mtp_ext.nn import ComposedModel
from mtp_ext.nn.huggingface import from_huggingface, load_huggingface, save_huggingface
from tests.nn.conftest import VOCAB_SIZE

pytestmark = pytest.mark.slow
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4}
TOKENS = torch.arange(12)[None]


def make_lm(**fields: Any) -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**({"vocab_size": VOCAB_SIZE} | SIZES | fields)))


def inject(module: nn.Module, *names: str) -> None:
    """Adds LoRA, in place, that changes the output."""
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=list(names), init_lora_weights=False), module)


class Adapted(nn.Linear):
    """A hand-made adapter."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__(inner.in_features, inner.out_features, bias=False)
        self.extra = nn.Parameter(torch.ones(inner.out_features))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.extra


def adapt(lm: Any) -> None:
    lm.model.layers[0].mlp.up_proj = Adapted(lm.model.layers[0].mlp.up_proj)


def widen(lm: Any) -> None:
    lm.model.layers[0].mlp.up_proj = nn.Linear(16, 32, bias=False)
    lm.model.layers[0].mlp.gate_proj = nn.Linear(16, 32, bias=False)
    lm.model.layers[0].mlp.down_proj = nn.Linear(32, 16, bias=False)


CHANGES: dict[str, Callable[[ComposedModel], None]] = {
    "LoRA in the trunk": lambda m: inject(m.trunk.language_model.model.layers[0], "q_proj"),
    "LoRA everywhere": lambda m: inject(m.trunk.language_model, "q_proj", "v_proj", "down_proj"),
    "LoRA in new heads": lambda m: inject(m.heads.head(2), "q_proj"),
    "an adapter": lambda m: adapt(m.trunk.language_model),
    "a parametrization": lambda m: nn.utils.parametrizations.weight_norm(
        m.trunk.language_model.model.layers[1].self_attn.o_proj
    ),
    "another shape": lambda m: widen(m.trunk.language_model),
}


@pytest.mark.parametrize("variant", ["parallel", "linear"])
@pytest.mark.parametrize("change", CHANGES)
def test_what_loading_would_not_read_is_not_saved(change: str, variant: str, tmp_path: Path) -> None:
    if variant == "linear" and change == "LoRA in new heads":
        pytest.skip("linear heads have no projections")
    model = from_huggingface(make_lm(), 3, variant)
    CHANGES[change](model)
    model.all_logits(TOKENS)
    with pytest.raises(ValueError, match=r"model must hold the weights of its .*merge_and_unload\(\)\): expected "):
        save_huggingface(model, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_untied_by_hand_is_not_saved(tmp_path: Path) -> None:
    lm = make_lm(tie_word_embeddings=True)
    lm.lm_head.weight = nn.Parameter(torch.randn(VOCAB_SIZE, 16))
    with pytest.raises(ValueError, match=r"got \[37, 16\]"):
        save_huggingface(from_huggingface(lm, 2), tmp_path)


def test_merged_adapters_are_saved(tmp_path: Path) -> None:
    lm = make_lm()
    model = from_huggingface(lm, 3)
    adapted = peft.get_peft_model(lm, peft.LoraConfig(target_modules=["q_proj", "up_proj"], init_lora_weights=False))
    expected = model.eval().all_logits(TOKENS)
    with pytest.raises(ValueError, match="merge what was added"):
        save_huggingface(model, tmp_path)
    adapted.merge_and_unload()
    torch.testing.assert_close(model.all_logits(TOKENS), expected)
    save_huggingface(model, tmp_path)
    torch.testing.assert_close(load_huggingface(tmp_path).eval().all_logits(TOKENS), expected)


def test_saving_draws_no_random_number(tmp_path: Path) -> None:
    model = from_huggingface(make_lm(), 2, "linear")
    state = torch.get_rng_state()
    save_huggingface(model, tmp_path)
    load_huggingface(tmp_path)
    assert torch.equal(torch.get_rng_state(), state)


def train_on(directory: Path) -> None:
    """Changes one number of the saved language model."""
    lm = transformers.AutoModelForCausalLM.from_pretrained(directory)
    with torch.no_grad():
        lm.model.layers[1].mlp.up_proj.weight[0, 0] += 0.01
    lm.save_pretrained(directory)


BASES: dict[str, Callable[[Path], object]] = {
    "of its shape": lambda d: make_lm().save_pretrained(d),
    "trained on": train_on,
    "with more layers": lambda d: make_lm(num_hidden_layers=4).save_pretrained(d),
    "absent": lambda d: (d / "model.safetensors").unlink(),
}


@pytest.mark.parametrize("base", BASES)
def test_heads_do_not_load_beside_another_model(base: str, tmp_path: Path) -> None:
    save_huggingface(from_huggingface(make_lm(), 2), tmp_path)
    BASES[base](tmp_path)
    with pytest.raises(ValueError, match=r"directory: the heads in .* were saved with another language model"):
        load_huggingface(tmp_path)


def test_heads_that_were_copied_beside_another_model(tmp_path: Path) -> None:
    """With or without their description."""
    for name in ("a", "b"):
        save_huggingface(from_huggingface(make_lm(), 2, init="random"), tmp_path / name)
    shutil.copy(tmp_path / "a" / "mtp_heads.safetensors", tmp_path / "b")
    with pytest.raises(ValueError, match="were saved with another language model"):
        load_huggingface(tmp_path / "b")


def test_the_same_weights_in_other_files_load(tmp_path: Path) -> None:
    """Divided anew, read in another dtype, and beside heads that were saved before they were compared."""
    model = from_huggingface(make_lm(dtype=torch.bfloat16).to(torch.bfloat16), 2, "causal").eval()
    expected = model.all_logits(TOKENS)
    save_huggingface(model, tmp_path)
    model.trunk.language_model.save_pretrained(tmp_path, max_shard_size="4KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert torch.equal(load_huggingface(tmp_path).eval().all_logits(TOKENS), expected)
    assert load_huggingface(tmp_path, dtype=torch.float64).unembed.weight.dtype == torch.float64
    heads = tmp_path / "mtp_heads.safetensors"
    save_file(load_file(heads), heads)
    with safe_open(heads, "pt") as file:
        assert file.metadata() is None
    assert torch.equal(load_huggingface(tmp_path).eval().all_logits(TOKENS), expected)


def test_a_missing_weight_of_a_head_is_an_error(tmp_path: Path) -> None:
    save_huggingface(from_huggingface(make_lm(), 3), tmp_path)
    heads, name = tmp_path / "mtp_heads.safetensors", "heads.2.block.layer.mlp.down_proj.weight"
    whole = load_file(heads)
    for change, message in (
        ({name: None}, rf"expected \[16, 24\] of name '{name}', got no weight"),
        ({name: torch.ones(1)}, rf"expected \[16, 24\] of name '{name}', got \[1\]"),
        ({"heads.3.norm.weight": torch.ones(16)}, r"expected no weight of name 'heads\.3\.norm\.weight', got \[16\]"),
    ):
        changed = {n: value for n, value in (whole | change).items() if value is not None}
        save_file(changed, heads)
        with pytest.raises(ValueError, match=message):
            load_huggingface(tmp_path)
    heads.write_bytes(b"damaged")
    for directory in (tmp_path, tmp_path / "absent"):
        with pytest.raises(ValueError, match="holds no heads"):
            load_huggingface(directory)
    assert json.loads((tmp_path / "mtp_heads.json").read_text()) == {"variant": "parallel", "n_future": 3}
