"""Models of transformers as trunks: small, randomly initialised, without the network."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtp_ext.nn.huggingface import from_huggingface, load_huggingface, save_huggingface
from tests.nn.conftest import SCHEDULES, VOCAB_SIZE

pytestmark = pytest.mark.slow
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

Make = Callable[..., Any]
Error = Callable[[Tensor, Tensor], float]
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
MODELS: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Llama tied": {"tie_word_embeddings": True},
    "Mistral": {"sliding_window": 5},
    "Qwen2": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "Qwen3": {"head_dim": 8},
    "Gemma": {"head_dim": 8},
    "Gemma2": {"head_dim": 8, "query_pre_attn_scalar": 8, "final_logit_softcapping": 2.0, "sliding_window": 5},
}
VARIANTS = ("parallel", "linear", "causal", "anticausal", "shared")


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    yield


def make_lm(name: str, **fields: Any) -> Any:
    family = name.split()[0]
    config = getattr(transformers, f"{family}Config")(**(SHAPE | MODELS[name] | fields))
    model = getattr(transformers, f"{family}ForCausalLM")(config).double().eval()
    with torch.no_grad():
        for parameter_name, p in model.named_parameters():
            p.normal_(std=0.3) if p.ndim > 1 else p.add_(0.2 * torch.randn_like(p))
            assert parameter_name
    return model


@pytest.mark.parametrize("init", ["copy_last_layer", "random"])
@pytest.mark.parametrize("variant", [v for v in VARIANTS if v != "anticausal"])
@pytest.mark.parametrize("name", MODELS)
def test_head_one_is_the_model_itself(name: str, variant: str, init: str, make_batch: Make) -> None:
    """Its soft cap, its sliding windows and its scaled embeddings included."""
    lm = make_lm(name)
    tokens, _ = make_batch(3)
    model = from_huggingface(lm, 3, variant, init)
    expected = lm(input_ids=tokens).logits
    torch.testing.assert_close(model(tokens), expected, rtol=1e-10, atol=1e-10)
    logits = model.all_logits(tokens)
    assert logits.shape == (3, 2, 12, VOCAB_SIZE)
    if name == "Gemma2":
        assert logits.abs().amax() < 2.0 and torch.isclose(logits.abs().amax(), torch.tensor(2.0).double(), atol=0.5)
    same = torch.equal(logits[1], logits[0])
    assert same == (variant == "shared" or (init == "copy_last_layer" and variant in ("parallel", "linear")))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_the_plain_sum_of_losses(
    name: str, variant: str, make_batch: Make, relative_error: Error
) -> None:
    lm = make_lm(name).train()
    model = from_huggingface(lm, 3, variant, "random")
    tokens, labels = make_batch(3)
    logits = model.all_logits(tokens)
    expected = sum(F.cross_entropy(logits[k - 1].flatten(0, 1), labels[:, k : k + 12].flatten()) for k in (1, 2, 3))
    expected.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters()}
    for schedule in SCHEDULES:
        model.zero_grad()
        loss = model(tokens, labels, schedule=schedule).loss
        loss.backward()
        assert relative_error(loss, expected) < 1e-12
        for n, p in model.named_parameters():
            assert relative_error(p.grad, grads[n]) < 1e-10, (schedule, n)  # its softmax is float32


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["Llama", "Mistral", "Qwen2", "Gemma2"])
def test_documents_do_not_leak(name: str, attention: str, make_batch: Make) -> None:
    if name == "Gemma2" and attention == "sdpa":
        pytest.skip("Gemma 2 caps its attention scores, which sdpa cannot")
    model = from_huggingface(make_lm(name, attn_implementation=attention), 3, "causal", "random")
    tokens, _ = make_batch(3)
    ids = torch.tensor([0] * 5 + [1] * 7).expand(2, -1)
    changed = tokens.clone()
    changed[:, 2] = (changed[:, 2] + 1) % VOCAB_SIZE
    before, after = model.all_logits(tokens, ids), model.all_logits(changed, ids)
    assert torch.equal(before[:, :, 5:], after[:, :, 5:]) and not torch.equal(before[:, :, :5], after[:, :, :5])
    torch.testing.assert_close(before[:, :, :5], model.all_logits(tokens[:, :5]), rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["parallel", "causal"])
@pytest.mark.parametrize("name", ["Llama tied", "Qwen2", "Gemma2"])
def test_train_save_load(name: str, variant: str, tmp_path: Path, make_batch: Make) -> None:
    lm = make_lm(name)
    model = from_huggingface(lm, 3, variant, "random").train()
    tokens, labels = make_batch(3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        result = model(tokens, labels)
        result.loss.backward()
        optimizer.step()
        losses.append(result.head_loss)
    assert (losses[-1] < losses[0]).all()
    save_huggingface(model, tmp_path)
    again = load_huggingface(tmp_path, dtype=torch.float64)
    assert torch.equal(again.eval().all_logits(tokens), model.eval().all_logits(tokens))
    # The language model alone is what transformers reads, and is head 1 of what was trained.
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    torch.testing.assert_close(plain(input_ids=tokens).logits, model(tokens), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(lm.eval()(input_ids=tokens).logits, model(tokens), rtol=1e-10, atol=1e-10)


def test_a_frozen_model_stays_as_it_is_under_new_heads(make_batch: Make) -> None:
    lm = make_lm("Llama").requires_grad_(False)
    before = copy.deepcopy(lm.state_dict())
    model = from_huggingface(lm, 3)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.01)
    tokens, labels = make_batch(3)
    first = model(tokens, labels)
    first.loss.backward()
    optimizer.step()
    second = model(tokens, labels)
    assert torch.equal(second.head_loss[0], first.head_loss[0]) and (second.head_loss[1:] < first.head_loss[1:]).all()
    assert all(torch.equal(value, before[name]) for name, value in lm.state_dict().items())


@pytest.mark.parametrize("variant", ["parallel", "causal"])
def test_gradient_checkpointing_of_transformers(variant: str, make_batch: Make, relative_error: Error) -> None:
    """A head's layer then runs again while its gradient is taken, outside the swap of its parameters."""
    lm = make_lm("Llama").train()
    model = from_huggingface(lm, 3, variant, "random")
    batch = make_batch(3)
    model(*batch).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    for module in model.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = False
    lm.gradient_checkpointing_enable({"use_reentrant": False})
    runs: list[int] = []
    lm.model.layers[-1].mlp.register_forward_pre_hook(lambda *args: runs.append(1))
    model.zero_grad()
    model(*batch).loss.backward()
    assert len(runs) == 2
    for name, p in model.named_parameters():
        assert relative_error(p.grad, expected[name]) < 1e-12, name


def test_a_copy_stands_alone(make_batch: Make) -> None:
    model = from_huggingface(make_lm("Llama"), 2)
    tokens, _ = make_batch(2)
    twin = copy.deepcopy(model)
    expected = model.all_logits(tokens)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert torch.equal(twin.all_logits(tokens), expected)


def test_state_dicts_load_strictly(make_batch: Make) -> None:
    model, other = from_huggingface(make_lm("Llama"), 3), from_huggingface(make_lm("Llama"), 3)
    tokens, _ = make_batch(3)
    state = model.state_dict()
    other.load_state_dict(state)
    assert torch.equal(other.all_logits(tokens), model.all_logits(tokens))
    name = "heads.2.block.layer.mlp.down_proj.weight"
    with pytest.raises(RuntimeError, match=f"Missing key.*{name}"):
        other.load_state_dict({k: v for k, v in state.items() if k != name})


def test_errors_name_the_argument() -> None:
    lm = make_lm("Llama")
    for arguments, error, message in (
        ((nn.Linear(2, 2), 2), TypeError, "model must be a causal language model of transformers, got Linear"),
        ((lm, 0), ValueError, "n_future must be an int of at least 1, got 0"),
        ((lm, 2, "replicated"), ValueError, "variant must be one of parallel, linear, causal, anticausal, shared here"),
        ((lm, 2, "parallel", "zeros"), ValueError, "init must be one of copy_last_layer, random"),
    ):
        with pytest.raises(error, match=message):
            from_huggingface(*arguments)
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=2))
    with pytest.raises(ValueError, match=r"one of the families llama, .* got GPT2LMHeadModel \(gpt2\)"):
        from_huggingface(gpt2, 2)


REPLACEMENTS: dict[str, Callable[[Any], object]] = {
    "more tokens": lambda lm: lm.resize_token_embeddings(VOCAB_SIZE + 3),
    "fewer tokens": lambda lm: lm.resize_token_embeddings(VOCAB_SIZE - 3),
    "another lm_head": lambda lm: setattr(lm, "lm_head", nn.Linear(16, VOCAB_SIZE, bias=False).double()),
    "another embedding": lambda lm: lm.set_input_embeddings(nn.Embedding(VOCAB_SIZE, 16).double()),
    "another layer": lambda lm: lm.model.layers.__setitem__(0, copy.deepcopy(lm.model.layers[0])),
    "a layer less": lambda lm: setattr(lm.model, "layers", lm.model.layers[:-1]),
    "LoRA on lm_head": lambda lm: peft.get_peft_model(lm, peft.LoraConfig(target_modules=["lm_head"])),
}


@pytest.mark.parametrize("name", ["Llama", "Llama tied"])
@pytest.mark.parametrize("change", REPLACEMENTS)
def test_a_part_that_is_replaced_later_is_an_error(change: str, name: str, tmp_path: Path, make_batch: Make) -> None:
    lm = make_lm(name)
    model = from_huggingface(lm, 3)
    tokens, labels = make_batch(3, vocab_size=VOCAB_SIZE - 3)
    model(tokens, labels)
    REPLACEMENTS[change](lm)
    if name == "Llama tied" and "tokens" in change:  # resized in place
        torch.testing.assert_close(model(tokens), lm(input_ids=tokens).logits)
        return
    calls = (lambda: model(tokens, labels), lambda: model(tokens), lambda: model.all_logits(tokens))
    for call in (*calls, lambda: save_huggingface(model, tmp_path / "saved")):
        with pytest.raises(ValueError, match="the language model must keep its embedding, layers, norm and lm_head"):
            call()
    assert not (tmp_path / "saved").exists()
    if change != "LoRA on lm_head":
        torch.testing.assert_close(from_huggingface(lm, 3)(tokens), lm(input_ids=tokens).logits)


def test_what_is_changed_within_the_parts_counts(make_batch: Make) -> None:
    """Weights that are set, tied again or given an adapter inside a layer; and a copy has its own parts."""
    lm = make_lm("Llama")
    model = from_huggingface(lm, 3)
    tokens, _ = make_batch(3)
    lm.lm_head.weight = nn.Parameter(torch.randn(VOCAB_SIZE, 16).double())
    torch.testing.assert_close(model(tokens), lm(input_ids=tokens).logits)
    lm.lm_head.weight = lm.model.embed_tokens.weight
    torch.testing.assert_close(model(tokens), lm(input_ids=tokens).logits)
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False), lm)
    torch.testing.assert_close(model(tokens), lm.eval()(input_ids=tokens).logits)
    torch.testing.assert_close(copy.deepcopy(model)(tokens), model(tokens))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_ids_out_of_range_are_named(schedule: str, make_batch: Make) -> None:
    model = from_huggingface(make_lm("Llama"), 3)
    for id_ in (VOCAB_SIZE, VOCAB_SIZE + 7, -1, -100):
        tokens, labels = make_batch(3)
        tokens[1, 4] = id_
        with pytest.raises(ValueError, match=rf"tokens must be in \[0, {VOCAB_SIZE}\), got values from"):
            model(tokens, labels, schedule=schedule)
        with pytest.raises(ValueError, match=rf"tokens must be in \[0, {VOCAB_SIZE}\)"):
            model(tokens)
        tokens, labels = make_batch(3)
        labels[1, 13] = id_
        if id_ == -100:
            assert model(tokens, labels, schedule=schedule).loss.isfinite()
            continue
        with pytest.raises(ValueError, match=rf"targets must be in \[0, {VOCAB_SIZE}\) or equal to ignore_index=-100"):
            model(tokens, labels, schedule=schedule)


def test_without_transformers_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str, *args: Any) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(ImportError, match=r"pip install 'mtp_ext\[transformers\]'"):
        from_huggingface(object(), 2)
