"""The weights that a run starts from, where it does not start from random ones (``--init-from``)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mtp_ext.nn import MTPConfig, MTPModel, add_heads, convert
from mtp_ext.nn.interop.huggingface import transformers
from mtp_ext.nn.interop.huggingface_files import HEADS_FILE
from mtp_ext.nn.interop.llama import from_llama
from mtp_ext.train.checkpoint.saved_model import TOKENIZER_DIRECTORY, load_saved_model
from mtp_ext.train.data import Tokenizer, load_tokenizer
from mtp_ext.train.data.tokenizer import TOKENIZER_FILE

# Fields that shape neither the weights nor what they compute.
FREE_FIELDS = ("max_seq_len", "dropout", "init_std", "embed_init_std", "unembed_init_std", "residual_init_scale")


@dataclass(frozen=True)
class InitialWeights:
    """A trained model to start from.

    Attributes:
        origin: The directory that it was loaded from.
        model: The model, on the CPU.
        tokenizer: Its tokenizer, and its path; ``None`` if the directory holds none.
    """

    origin: Path
    model: MTPModel
    tokenizer: tuple[Tokenizer, Path] | None

    def load_into(self, model: MTPModel, tokenizer: Tokenizer) -> None:
        """Copies the weights into a run's model, whose tokenizer must be the same.

        A model with one head gets the others of the run's as copies of it.

        Raises:
            ValueError: Another tokenizer, or an architecture that is not the run's, nor equivalent to it.
        """
        if self.tokenizer is not None and self.tokenizer[0].fingerprint != tokenizer.fingerprint:
            own, path = self.tokenizer
            raise ValueError(
                f"init_from: the run's tokenizer ({tokenizer.vocab_size} tokens) is not that of {self.origin} "
                f"({own.vocab_size} tokens): pass --data.tokenizer {path}"
            )
        model.load_state_dict(self._fitted(model.config).state_dict())

    def _fitted(self, config: MTPConfig) -> MTPModel:
        """Returns the model in the architecture of ``config``."""
        model, own = self.model, self.model.config
        grows = own.n_future == 1 < config.n_future
        try:
            if grows or (own.n_future, own.n_layers) == (config.n_future, config.n_layers):
                model = convert(
                    model,
                    variant=own.variant if grows else config.variant,
                    replicate_unembedding=config.replicate_unembedding,
                    shared_final_norm=config.shared_final_norm,
                )
            if grows:
                model = add_heads(model, config.n_future, config.variant)
        except ValueError as error:
            raise ValueError(f"init_from: {self.origin} cannot become the run's model: {error}") from None
        found, wanted = _architecture(model.config), _architecture(config)
        names = [name for name in wanted if found[name] != wanted[name]]
        if names:
            theirs, ours = (", ".join(f"{name}={x[name]}" for name in names) for x in (found, wanted))
            raise ValueError(f"init_from: {self.origin} gives a model with {theirs}, but the run's model has {ours}")
        return model


def load_initial_weights(path: Path, max_seq_len: int) -> InitialWeights:
    """Loads the model of a checkpoint, of a run's last checkpoint, or of a directory of transformers.

    Args:
        path: The directory.
        max_seq_len: Maximum sequence length of the run's model.
    Raises:
        ImportError: It is a directory of transformers, which is not installed.
        ValueError: It holds no model, or one that has no equivalent here.
    """
    if not _is_huggingface(path):
        saved = load_saved_model(path, torch.device("cpu"))
        origin = saved.checkpoint.path
        return InitialWeights(origin, saved.model, (saved.tokenizer, origin / TOKENIZER_DIRECTORY))
    if (path / HEADS_FILE).exists():
        raise ValueError(f"init_from: {path} holds heads ({HEADS_FILE}), which a run cannot start from; remove them")
    try:
        model, report = transformers().AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, local_files_only=True, output_loading_info=True
        )
        for state in ("missing_keys", "unexpected_keys"):
            if report[state]:
                raise ValueError(f"{state.replace('_', ' ')}: {', '.join(sorted(report[state])[:3])}")
        converted = from_llama(model, max_seq_len=max_seq_len)
    except (OSError, ValueError) as error:
        raise ValueError(f"init_from: cannot start from {path}: {error}") from None
    file = path / TOKENIZER_FILE
    return InitialWeights(path, converted, (load_tokenizer(file), file) if file.exists() else None)


def _is_huggingface(path: Path) -> bool:
    """Returns True for a directory with a configuration of transformers; our own have no ``model_type``."""
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and "model_type" in config


def _architecture(config: MTPConfig) -> dict[str, Any]:
    """Returns what must be equal, with defaults filled in."""
    fields = {name: value for name, value in config.to_dict().items() if name not in FREE_FIELDS}
    return fields | {
        "n_kv_heads": config.kv_heads,
        "d_ff": config.ff_dim,
        "replicate_unembedding": config.replicates,
        "shared_final_norm": config.one_final_norm,
    }
