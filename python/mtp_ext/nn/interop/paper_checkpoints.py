"""The checkpoint layout of the paper's released models: ``params.json`` beside ``consolidated.pth``.

Names are those of the Llama reference code. ``layers`` holds the trunk's layers and, last, head 1; ``extra_heads.{i}``
is head ``i + 2``; all heads share the final ``norm`` and ``output``. ``params.json`` counts trunk and heads together in
``n_layers``, as :class:`mtp_ext.nn.MTPConfig` does.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtp_ext.nn.config import MTPConfig
from mtp_ext.nn.model import MTPModel

PARAMS_FILE = "params.json"
WEIGHTS_FILE = "consolidated.pth"
# Ours <- theirs; several of theirs are concatenated along the rows into one matrix of ours.
LAYER_NAMES = {
    "attention_norm.weight": ("attention_norm.weight",),
    "attention.qkv.weight": ("attention.wq.weight", "attention.wk.weight", "attention.wv.weight"),
    "attention.out.weight": ("attention.wo.weight",),
    "ff_norm.weight": ("ffn_norm.weight",),
    "ff.gate_up.weight": ("feed_forward.w1.weight", "feed_forward.w3.weight"),
    "ff.down.weight": ("feed_forward.w2.weight",),
}
TOP_NAMES = {
    "embed.weight": "tok_embeddings.weight",
    "unembed.weight": "output.weight",
    "heads.norm.weight": "norm.weight",
}
COMPUTED = ("rope.freqs",)  # tables in old checkpoints that follow from the shape


def load_released(directory: Path | str, *, max_seq_len: int = 4096, dtype: torch.dtype | None = None) -> MTPModel:
    """Loads a released checkpoint on the CPU.

    Args:
        directory: Holds ``params.json`` and one file ``consolidated*.pth``.
        max_seq_len: Maximum sequence length, which the checkpoint does not store.
        dtype: Dtype of the parameters; default that of the file.
    Raises:
        ValueError: A file is missing, unreadable, one of several shards, or has a missing or unexpected weight.
    """
    directory = Path(directory)
    weights = _read_weights(directory)
    config = _config(_read_params(directory), weights, max_seq_len)
    with torch.device("meta"):
        model = MTPModel(config)
    state = from_reference_names(weights, config)
    if dtype is not None:
        state = {name: value.to(dtype) for name, value in state.items()}
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise ValueError(f"{directory / PARAMS_FILE} does not fit the weights beside it ({error})") from None
    return model


def save_released(model: MTPModel, directory: Path | str) -> None:
    """Saves a parallel model in the layout of the released checkpoints.

    Raises:
        ValueError: The layout cannot represent the model: another variant, different final norms, several unembeddings
            or soft-capped logits.
    """
    directory, config = Path(directory), model.config
    if config.variant != "parallel" or config.replicates or config.softcap is not None:
        raise ValueError(
            "model must be of the parallel variant, with one unembedding and without a softcap, to be saved in the "
            f"released layout, got variant={config.variant!r}, softcap={config.softcap}"
        )
    state = {name: value.detach().cpu() for name, value in model.state_dict().items()}
    if not config.one_final_norm:
        norms = [state.pop(f"heads.{k}.norm.weight") for k in range(config.n_future)]
        if any(not torch.equal(norm, norms[0]) for norm in norms):
            raise ValueError("model must have one final norm for all heads, got norms that differ (shared_final_norm)")
        state["heads.norm.weight"] = norms[0]
    directory.mkdir(parents=True, exist_ok=True)
    torch.save(_theirs(state, config), directory / WEIGHTS_FILE)
    (directory / PARAMS_FILE).write_text(json.dumps(_params(config), indent=2) + "\n", encoding="utf-8")


def _layer_prefixes(config: MTPConfig) -> dict[str, str]:
    """Maps our layer prefixes to theirs."""
    trunk = config.n_trunk_layers
    prefixes = {f"trunk.layers.{i}.": f"layers.{i}." for i in range(trunk)}
    prefixes["heads.0.block."] = f"layers.{trunk}."
    return prefixes | {f"heads.{k}.block.": f"extra_heads.{k - 1}." for k in range(1, config.n_future)}


def from_reference_names(weights: Mapping[str, Tensor], config: MTPConfig) -> dict[str, Tensor]:
    """Returns the state dict of a parallel model with a shared final norm, from weights under the reference's names.

    Raises:
        ValueError: A weight is missing or unexpected.
    """
    left = {name: value for name, value in weights.items() if name not in COMPUTED}
    try:
        state = {ours: left.pop(theirs) for ours, theirs in TOP_NAMES.items()}
        for ours, theirs in _layer_prefixes(config).items():
            for name, parts in LAYER_NAMES.items():
                values = [left.pop(theirs + part) for part in parts]
                state[ours + name] = values[0] if len(values) == 1 else torch.cat(values)
    except KeyError as error:
        raise ValueError(f"weights lack {error.args[0]!r}") from None
    if left:
        raise ValueError(f"weights hold {next(iter(left))!r}, which does not belong to a model with these params")
    return state


def _theirs(state: Mapping[str, Tensor], config: MTPConfig) -> dict[str, Tensor]:
    weights = {theirs: state[ours] for ours, theirs in TOP_NAMES.items()}
    width, kv_width = config.n_attn_heads * config.head_dim, config.kv_heads * config.head_dim
    rows = {"attention.qkv.weight": [width, kv_width, kv_width], "ff.gate_up.weight": [config.ff_dim] * 2}
    for ours, theirs in _layer_prefixes(config).items():
        for name, parts in LAYER_NAMES.items():
            value = state[ours + name]
            pieces = torch.split(value, rows[name]) if name in rows else [value]
            weights.update({theirs + part: piece.clone() for part, piece in zip(parts, pieces, strict=True)})
    return weights


def _read_params(directory: Path) -> dict[str, Any]:
    try:
        params: dict[str, Any] = json.loads((directory / PARAMS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"directory: cannot read {directory / PARAMS_FILE} ({error})") from None
    return params


def _read_weights(directory: Path) -> dict[str, Tensor]:
    files = sorted(directory.glob("consolidated*.pth"))
    if len(files) != 1:
        raise ValueError(f"directory: expected one file consolidated*.pth in {directory}, got {len(files)}")
    weights: dict[str, Tensor] = torch.load(files[0], map_location="cpu", weights_only=True)
    return weights


def _config(params: Mapping[str, Any], weights: Mapping[str, Tensor], max_seq_len: int) -> MTPConfig:
    """Builds the configuration; sizes that ``params.json`` gives only by a formula come from the weights."""
    try:
        vocab_size, d_model = weights["tok_embeddings.weight"].shape
        return MTPConfig(
            vocab_size=vocab_size,
            d_model=d_model,
            n_layers=params["n_layers"],
            n_attn_heads=params["n_heads"],
            n_kv_heads=params.get("n_kv_heads"),
            d_ff=weights["layers.0.feed_forward.w1.weight"].shape[0],
            max_seq_len=max_seq_len,
            n_future=params.get("n_future_tokens", 1),
            shared_final_norm=True,
            rope_theta=params.get("rope_theta", 10_000.0),
            norm_eps=params.get("norm_eps", 1e-5),
        )
    except KeyError as error:
        raise ValueError(f"directory: params.json or the weights lack {error.args[0]!r}") from None


def _params(config: MTPConfig) -> dict[str, Any]:
    params = {
        "dim": config.d_model,
        "n_layers": config.n_layers,
        "n_heads": config.n_attn_heads,
        "n_kv_heads": config.kv_heads,
        "vocab_size": config.vocab_size,
        "norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "n_future_tokens": config.n_future,
    }
    return params | _feed_forward_params(config.d_model, config.ff_dim)


def _feed_forward_params(width: int, ff_dim: int) -> dict[str, Any]:
    """Inverts the reference code's rule ``ff_dim = m * ceil(int(f * int(8 D / 3)) / m)``."""
    hidden = int(8 * width / 3)
    for multiple in (256, ff_dim):
        if multiple * math.ceil(hidden / multiple) == ff_dim:
            return {"multiple_of": multiple}
    inside = max(1, ff_dim // 2) + 0.25  # any value that rounds up to ff_dim, clear of floating-point error
    return {"multiple_of": ff_dim, "ffn_dim_multiplier": inside / hidden}
