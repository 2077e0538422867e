"""Llama-shaped models of transformers as models of this package with one head."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from mtp_ext.nn.config import MTPConfig
from mtp_ext.nn.interop.paper_checkpoints import from_reference_names
from mtp_ext.nn.model import MTPModel

FAMILIES = ("llama", "mistral")
# Names of transformers, and those of the Llama reference code.
REFERENCE_NAMES = {
    "model.embed_tokens": "tok_embeddings",
    "model.norm": "norm",
    "lm_head": "output",
    "model.layers": "layers",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
}


def from_llama(model: Any, *, max_seq_len: int) -> MTPModel:
    """Returns an :class:`mtp_ext.nn.MTPModel` with one head and the logits of ``model``, with copies of its weights.

    Args:
        model: A ``LlamaForCausalLM`` or ``MistralForCausalLM``.
        max_seq_len: Maximum sequence length of the result.
    Raises:
        ValueError: The model is of another family, or has biases, adapters, scaled rotations, attention heads of
            another width than ``d_model / n_attn_heads``, or a sliding window below ``max_seq_len``.
    """
    theirs = model.config
    rope = theirs.rope_parameters
    for name, found, expected in (
        ("model_type", theirs.model_type, FAMILIES),
        ("hidden_act", theirs.hidden_act, ("silu",)),
        ("rope_type", rope["rope_type"], ("default",)),
        ("head_dim", getattr(theirs, "head_dim", None), (None, theirs.hidden_size // theirs.num_attention_heads)),
    ):
        if found not in expected:
            raise ValueError(f"model must have {name} {' or '.join(map(str, expected))} to be converted, got {found!r}")
    window = getattr(theirs, "sliding_window", None)
    if window is not None and window < max_seq_len:
        raise ValueError(f"max_seq_len must be at most the model's sliding window {window}, got {max_seq_len}")
    config = MTPConfig(
        vocab_size=theirs.vocab_size,
        d_model=theirs.hidden_size,
        n_layers=theirs.num_hidden_layers,
        n_attn_heads=theirs.num_attention_heads,
        n_kv_heads=theirs.num_key_value_heads,
        d_ff=theirs.intermediate_size,
        max_seq_len=max_seq_len,
        n_future=1,
        tie_embeddings=theirs.tie_word_embeddings,
        shared_final_norm=True,
        rope_theta=rope["rope_theta"],
        norm_eps=theirs.rms_norm_eps,
    )
    weights = {_reference_name(name): value for name, value in model.state_dict().items()}
    for name, value in weights.items():
        if name.endswith(("attention.wq.weight", "attention.wk.weight")):
            weights[name] = _paired_rows(value, config.head_dim)
    with torch.device("meta"):
        ours = MTPModel(config)
    state = {name: value.clone() for name, value in from_reference_names(weights, config).items()}
    ours.load_state_dict(state, assign=True)
    if config.tie_embeddings:
        ours.unembed.weight = ours.embed.weight
    return ours.train(model.training)


def _reference_name(name: str) -> str:
    return re.sub("|".join(map(re.escape, REFERENCE_NAMES)), lambda match: REFERENCE_NAMES[match[0]], name)


def _paired_rows(weight: Tensor, head_dim: int) -> Tensor:
    """Reorders the rows of each attention head: a rotation's two rows are half a head apart in transformers."""
    return weight.view(-1, 2, head_dim // 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
