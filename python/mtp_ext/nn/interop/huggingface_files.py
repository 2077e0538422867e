"""Files of a language model of transformers with heads: the model as its library saves it, the heads beside it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mtp_ext.nn.composed import ComposedModel
from mtp_ext.nn.interop.huggingface import from_huggingface, transformers, trunk_of

HEADS_FILE, DESCRIPTION_FILE = "mtp_heads.safetensors", "mtp_heads.json"
BASE = "base"  # metadata of the heads: the hash of the language model's weights


def save_huggingface(model: ComposedModel, directory: Path | str) -> None:
    """Saves the language model with its ``save_pretrained``, and the new heads beside it.

    Raises:
        ValueError: Loading would not give this model: it holds weights besides those of its configuration (adapters
            such as LoRA), or of other shapes.
    """
    directory, trunk = Path(directory), trunk_of(model)
    language_model = trunk.language_model
    trunk.check_parts()
    with torch.device("meta"):
        plain = transformers().AutoModelForCausalLM.from_config(language_model.config)
        expected = _shapes(from_huggingface(plain, model.heads.n_heads, model.variant).named_parameters())
    _check_shapes(
        _shapes(model.named_parameters()),
        expected,
        "model must hold the weights of its language model's configuration and of its heads; merge what was added to "
        "them first (LoRA: merge_and_unload())",
    )
    language_model.save_pretrained(directory)
    new = {name: p.detach().cpu().contiguous() for name, p in _new_parameters(model).items()}
    save_file(new, directory / HEADS_FILE, metadata={BASE: _hash_of_weights(directory)})
    description = {"variant": model.variant, "n_future": model.heads.n_heads}
    (directory / DESCRIPTION_FILE).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")


def load_huggingface(directory: Path | str, **keywords: Any) -> ComposedModel:
    """Loads a model saved by :func:`save_huggingface`.

    Args:
        directory: The directory.
        keywords: For ``AutoModelForCausalLM.from_pretrained``, such as ``dtype`` and ``attn_implementation``.
    Raises:
        ImportError: transformers is not installed.
        ValueError: A file is missing, a head's weight is missing, unexpected or of another shape, or the language
            model is not the one that the heads were saved with.
    """
    directory = Path(directory)
    try:
        description = json.loads((directory / DESCRIPTION_FILE).read_text(encoding="utf-8"))
        with safe_open(directory / HEADS_FILE, "pt") as file:
            base = (file.metadata() or {}).get(BASE)  # absent in old files
            new = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"directory: {directory} holds no heads ({error})") from None
    if base not in (None, _hash_of_weights(directory)):
        raise ValueError(
            f"directory: the heads in {directory} were saved with another language model than the one beside them, "
            "whose hidden states they do not read: save both together, with save_huggingface"
        )
    language_model = transformers().AutoModelForCausalLM.from_pretrained(directory, **keywords)
    with torch.random.fork_rng(devices=[]):
        model = from_huggingface(language_model, description["n_future"], description["variant"])
    wanted = _new_parameters(model)
    _check_shapes(_shapes(new.items()), _shapes(wanted.items()), f"directory: {directory / HEADS_FILE} must fit")
    with torch.no_grad():
        for name, p in wanted.items():
            p.copy_(new[name])
    return model


def _new_parameters(model: ComposedModel) -> dict[str, Tensor]:
    """Returns the parameters that the language model does not have."""
    own = {id(p) for p in trunk_of(model).language_model.parameters()}
    return {name: p for name, p in model.named_parameters() if id(p) not in own}


def _shapes(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in tensors}


def _check_shapes(found: dict[str, list[int]], expected: dict[str, list[int]], rule: str) -> None:
    """Raises ValueError, beginning with ``rule``, that names the first difference."""
    for name in sorted(found.keys() | expected.keys()):
        ours, theirs = (shapes.get(name, "no weight") for shapes in (found, expected))
        if ours != theirs:
            raise ValueError(f"{rule}: expected {theirs} of name {name!r}, got {ours}")


def _hash_of_weights(directory: Path) -> str:
    """Returns the SHA-256 of a saved language model's weights, however they are divided into files."""
    with ExitStack() as stack:
        files = [stack.enter_context(safe_open(path, "pt")) for path in directory.glob("model*.safetensors")]
        held = {name: file for file in files for name in file.keys()}
        digest = hashlib.sha256()
        for name in sorted(held):
            tensor = held[name].get_tensor(name)
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
