"""Runs that start from trained weights: of a run, a checkpoint, or a model of transformers."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mtp_ext.cli.main import main
from mtp_ext.nn import MTPModel
from mtp_ext.nn.huggingface import from_huggingface, save_huggingface
from mtp_ext.train.checkpoint.directory import list_checkpoints, load_training_state, read_checkpoint
from mtp_ext.train.checkpoint.saved_model import load_saved_model
from mtp_ext.train.config import OptimConfig, TrainConfig
from mtp_ext.train.config_file import read_config, write_config
from tests.train.tiny import run, tiny_config

pytestmark = pytest.mark.slow
STILL = OptimConfig(lr=0.0, muon_lr=0.0, weight_decay=0.0)  # the weights stay what they start as
TOKENS = torch.arange(20)[None]


def config_of(root: Path, name: str, source: Path | None = None, *, steps: int = 1, **model: Any) -> TrainConfig:
    """A run that keeps its weights; ``model`` replaces fields of the tiny model."""
    config = tiny_config(root, out=root / name, init_from=source, max_steps=steps, optim=STILL)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **model))


def model_of(directory: Path) -> MTPModel:
    return load_saved_model(directory, torch.device("cpu")).model


def trained(root: Path, **model: Any) -> Path:
    """A run of three steps with three checkpoints."""
    config = config_of(root, "first", steps=3, **model)
    checkpoint = dataclasses.replace(config.checkpoint, every_steps=1)
    return run(dataclasses.replace(config, optim=OptimConfig(), checkpoint=checkpoint)).directory


def assert_same_weights(one: MTPModel, other: MTPModel) -> None:
    for (name, p), q in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), name


@pytest.mark.parametrize("variant", ["parallel", "sequential_modules", "replicated"])
def test_a_run_and_a_checkpoint(variant: str, tmp_path: Path) -> None:
    """Its weights alone: steps, optimiser and data order start anew."""
    first = trained(tmp_path, variant=variant)
    outcome = run(config_of(tmp_path, "second", first, variant=variant))
    assert_same_weights(model_of(outcome.directory), model_of(first))
    checkpoint = read_checkpoint(outcome.checkpoint)
    assert checkpoint is not None and checkpoint.step == 1
    state, before = (load_training_state(c) for c in (checkpoint, list_checkpoints(first / "checkpoints")[0]))
    steps = [moments["step"] for moments in state["optimizers"][0]["state"].values()]
    assert steps and all(int(step) == 1 for step in steps)
    assert state["stream"] == before["stream"] and state["progress"]["tokens"] == before["progress"]["tokens"]
    middle = first / "checkpoints" / "step-00000002"
    third = run(config_of(tmp_path, "third", middle, variant=variant))
    assert_same_weights(model_of(third.directory), model_of(middle))
    start = model_of(run(config_of(tmp_path, "plain", variant=variant)).directory)
    assert not torch.equal(start.embed.weight, model_of(first).embed.weight)


def test_it_is_recorded_and_not_asked_for_again(tmp_path: Path) -> None:
    first = trained(tmp_path)
    outcome = run(config_of(tmp_path, "second", first))
    assert read_config(outcome.directory).init_from == first
    assert "init_from" in (outcome.directory / "config.toml").read_text()
    shutil.rmtree(first)
    checkpoint = read_checkpoint(outcome.checkpoint)
    again = run(config_of(tmp_path, "second", first, steps=2), checkpoint)
    assert list_checkpoints(again.directory / "checkpoints")[-1].step == 2


def test_one_head_gets_more(tmp_path: Path) -> None:
    first = trained(tmp_path, n_future=1)
    one = model_of(first)
    for variant in ("parallel", "linear", "causal", "sequential_modules", "shared", "replicated"):
        added = 2 if variant in ("parallel", "causal", "sequential_modules") else 0
        fields = {"n_future": 3, "variant": variant, "n_layers": one.config.n_layers + added}
        grown = model_of(run(config_of(tmp_path, variant, first, **fields)).directory)
        torch.testing.assert_close(grown(TOKENS), one(TOKENS))
        if variant not in ("causal", "sequential_modules"):
            logits = grown.all_logits(TOKENS)
            torch.testing.assert_close(logits[2], logits[0])


def test_equivalent_architectures(tmp_path: Path) -> None:
    first = trained(tmp_path, variant="shared")
    changes: list[dict[str, Any]] = [{"variant": "replicated"}, {"variant": "shared", "max_seq_len": 400}]
    for name, fields in zip("ab", changes, strict=True):
        second = model_of(run(config_of(tmp_path, name, first, **fields)).directory)
        assert torch.equal(second.all_logits(TOKENS), model_of(first).all_logits(TOKENS))


MISFITS: dict[str, tuple[dict[str, Any], str]] = {
    "width": ({"d_model": 32}, r"gives a model with d_model=16, but the run's model has d_model=32"),
    "layers": ({"n_layers": 5}, r"gives a model with n_layers=3, but the run's model has n_layers=5"),
    "several": (
        {"d_model": 32, "d_ff": 64, "rope_theta": 5.0, "norm_eps": 1e-6, "n_kv_heads": 1},
        r"d_model=16, n_kv_heads=2, d_ff=32, rope_theta=10000.0, norm_eps=1e-05, but .* d_model=32, n_kv_heads=1, d_ff",
    ),
    "more heads": (
        {"n_future": 3, "n_layers": 4},
        r"n_layers=3, n_future=2, but the run's model has n_layers=4, n_",
    ),
    "fewer heads": ({"n_future": 1}, r"gives a model with n_future=2, but the run's model has n_future=1"),
    "variant": ({"variant": "causal"}, r"cannot become the run's model: variant must be equivalent to 'parallel'"),
    "tied": ({"tie_embeddings": True}, r"with tie_embeddings=False, but the run's model has tie_embeddings=True"),
    "norm": ({"shared_final_norm": True}, r"cannot become the run's model: model must have equal final norms"),
}


def test_another_architecture_is_refused_by_its_fields(tmp_path: Path) -> None:
    first = trained(tmp_path)
    for fields, message in MISFITS.values():
        with pytest.raises(ValueError, match=f"init_from: .*{message}"):
            run(config_of(tmp_path, "second", first, **fields))
        assert not (tmp_path / "second").exists()


def test_a_linear_head_alone_cannot_get_more(tmp_path: Path) -> None:
    first = trained(tmp_path, n_future=1, variant="linear")
    with pytest.raises(ValueError, match=r"init_from: .* cannot become the run's model: model must not have a linear"):
        run(config_of(tmp_path, "second", first))


def with_tokenizer(config: TrainConfig, tokenizer: str | Path) -> TrainConfig:
    return dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=str(tokenizer)))


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    """Also one of the same size, learnt from another corpus; the message says which to pass."""
    first = run(with_tokenizer(config_of(tmp_path, "first", steps=1), "bpe:257")).directory
    path = list_checkpoints(first / "checkpoints")[-1].path / "tokenizer"
    assert model_of(first).config.vocab_size == 257
    for tokenizer in ("bytes", "bpe:260"):
        with pytest.raises(ValueError, match=rf"the run's tokenizer \(2.. tokens\) is not that of .* {path}"):
            run(with_tokenizer(config_of(tmp_path, "second", first), tokenizer))
    assert not (tmp_path / "second").exists()
    second = run(with_tokenizer(config_of(tmp_path, "second", first), path)).directory
    assert_same_weights(model_of(second), model_of(first))


def test_a_path_without_a_model_is_named(tmp_path: Path) -> None:
    first = trained(tmp_path)
    (tmp_path / "empty").mkdir()
    weights = first / "checkpoints" / "step-00000003" / "model.safetensors"
    damaged = weights.read_bytes()[:-1] + b"x"
    weights.write_bytes(damaged)
    for path, message in (
        (tmp_path / "absent", "does not exist"),
        (tmp_path / "empty", "has no complete checkpoint"),
        (weights.parent, "is damaged: the checksum of model.safetensors"),
    ):
        with pytest.raises(ValueError, match=message):
            run(config_of(tmp_path, "second", path))
    second = run(config_of(tmp_path, "second", first)).directory  # the last good one
    assert_same_weights(model_of(second), model_of(first / "checkpoints" / "step-00000002"))


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = trained(tmp_path)
    write_config(config_of(tmp_path, "second"), tmp_path)
    base = ["train", "--config", str(tmp_path / "config.toml"), "--init-from"]
    assert main([*base, str(first)]) == 0
    assert f"from {first}" in capsys.readouterr().out.replace("\n", "")
    assert_same_weights(model_of(tmp_path / "second"), model_of(first))
    assert main([*base, str(first), "--out", str(tmp_path / "third"), "--model.d-model", "32"]) == 2
    assert "d_model=16, but the run's model has d_model=32" in capsys.readouterr().err
    other = [*base, str(tmp_path / "second"), "--resume", str(tmp_path / "second"), "--max-steps", "2"]
    assert main(other) == 2
    assert "init_from" in capsys.readouterr().err


def save_llama(directory: Path, name: str = "Llama", **fields: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 257, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    config = getattr(transformers, f"{name}Config")(**(sizes | {"rms_norm_eps": 1e-5} | fields))
    lm = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    lm.save_pretrained(directory)
    return lm


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_of_transformers(tied: bool, tmp_path: Path) -> None:
    lm = save_llama(tmp_path / "hf", tie_word_embeddings=tied, num_key_value_heads=1)
    fields: dict[str, Any] = {"tie_embeddings": tied, "n_kv_heads": 1}
    one = model_of(run(config_of(tmp_path, "one", tmp_path / "hf", n_future=1, n_layers=2, **fields)).directory)
    torch.testing.assert_close(one(TOKENS), lm(input_ids=TOKENS).logits, rtol=1e-4, atol=1e-5)
    for name, more in (("two", {}), ("norm", {"shared_final_norm": True}), ("own", {"replicate_unembedding": True})):
        config = config_of(tmp_path, name, tmp_path / "hf", n_future=2, n_layers=3, **fields, **more)
        torch.testing.assert_close(model_of(run(config).directory)(TOKENS), one(TOKENS))


def lora(directory: Path) -> None:
    peft = pytest.importorskip("peft")
    lm = save_llama(directory)
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["q_proj"]), lm)
    lm.save_pretrained(directory)


HUGGING_FACE: dict[str, tuple[Callable[[Path], object], str]] = {
    "width": (
        lambda d: save_llama(d, hidden_size=32),
        "gives a model with d_model=32, .* d_model=16",
    ),
    "vocabulary": (
        lambda d: save_llama(d, vocab_size=300),
        "with vocab_size=300, .* vocab_size=257",
    ),
    "epsilon": (
        lambda d: save_llama(d, rms_norm_eps=1e-6),
        "with norm_eps=1e-06, .* norm_eps=1e-05",
    ),
    "family": (lambda d: save_llama(d, "Qwen2"), "cannot start from .*: model must have model_type llama or mistral"),
    "window": (lambda d: save_llama(d, "Mistral", sliding_window=8), "max_seq_len must be at most the model's sliding"),
    "adapters": (lora, "cannot start from .*: missing keys: model.layers.0.self_attn.q_proj.weight"),
    "heads": (lambda d: save_huggingface(from_huggingface(save_llama(d), 2), d), "holds heads .*mtp_heads.safetensors"),
    "no weights": (lambda d: (save_llama(d), (d / "model.safetensors").unlink()), "cannot start from"),
}


@pytest.mark.parametrize("kind", HUGGING_FACE)
def test_a_model_of_transformers_that_does_not_fit(kind: str, tmp_path: Path) -> None:
    make, message = HUGGING_FACE[kind]
    make(tmp_path / "hf")
    with pytest.raises(ValueError, match=f"init_from: .*{message}"):
        run(config_of(tmp_path, "second", tmp_path / "hf"))
    assert not (tmp_path / "second").exists()


def test_the_tokenizer_of_a_model_of_transformers(tmp_path: Path) -> None:
    learnt = run(with_tokenizer(config_of(tmp_path, "first", steps=1), "bpe:300")).directory
    tokenizer = list_checkpoints(learnt / "checkpoints")[-1].path / "tokenizer" / "tokenizer.json"
    lm = save_llama(tmp_path / "hf", vocab_size=300)
    shutil.copy(tokenizer, tmp_path / "hf")
    config = config_of(tmp_path, "second", tmp_path / "hf")
    with pytest.raises(ValueError, match=r"the run's tokenizer \(257 tokens\) is not that of .*tokenizer\.json"):
        run(config)
    outcome = run(with_tokenizer(config, tmp_path / "hf" / "tokenizer.json"))
    torch.testing.assert_close(model_of(outcome.directory)(TOKENS), lm(input_ids=TOKENS).logits, rtol=1e-4, atol=1e-5)
    assert isinstance(model_of(outcome.directory).unembed, nn.Linear)
