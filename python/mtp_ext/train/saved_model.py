"""What makes a checkpoint self-contained: configurations of model and run and the tokenizer beside the weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from mtp_ext.nn import MTPConfig, MTPModel
from mtp_ext.train.checkpoint import Checkpoint, load_model_state, resolve_checkpoint
from mtp_ext.train.config import TrainConfig
from mtp_ext.train.config_file import read_config, write_config
from mtp_ext.train.data import Tokenizer, load_tokenizer

MODEL_CONFIG_FILE = "model.json"
TOKENIZER_DIRECTORY = "tokenizer"


@dataclass(frozen=True)
class SavedModel:
    """A model from a checkpoint, ready to run.

    Attributes:
        checkpoint: Where it came from.
        config: The configuration of its run.
        tokenizer: Its tokenizer.
        model: The model, on its device, in evaluation mode.
    """

    checkpoint: Checkpoint
    config: TrainConfig
    tokenizer: Tokenizer
    model: MTPModel


def write_description(directory: Path, config: TrainConfig, model: MTPConfig, tokenizer: Tokenizer) -> None:
    """Writes everything that a checkpoint needs beside its tensors."""
    write_config(config, directory)
    (directory / MODEL_CONFIG_FILE).write_text(json.dumps(model.to_dict(), indent=2) + "\n", encoding="utf-8")
    (directory / TOKENIZER_DIRECTORY).mkdir()
    tokenizer.save(directory / TOKENIZER_DIRECTORY)


def read_model_config(checkpoint: Checkpoint) -> MTPConfig:
    """The model's configuration in a checkpoint.

    Raises:
        ValueError: It is absent or damaged.
    """
    path = checkpoint.path / MODEL_CONFIG_FILE
    try:
        return MTPConfig.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, TypeError, ValueError) as error:
        raise ValueError(f"checkpoint: {path} cannot be read ({error})") from None


def load_saved_model(path: Path, device: torch.device) -> SavedModel:
    """Loads the model of a checkpoint, or of the latest checkpoint of a run.

    Args:
        path: The directory of either.
        device: Where the model goes.
    Raises:
        ValueError: There is no whole checkpoint, or it is not one of a model of this version.
    """
    checkpoint = resolve_checkpoint(path)
    model = MTPModel(read_model_config(checkpoint))
    try:
        model.load_state_dict(load_model_state(checkpoint))
    except RuntimeError as error:
        raise ValueError(f"checkpoint: {checkpoint.path} does not fit its own {MODEL_CONFIG_FILE} ({error})") from None
    config, tokenizer = read_config(checkpoint.path), load_tokenizer(checkpoint.path / TOKENIZER_DIRECTORY)
    return SavedModel(checkpoint, config, tokenizer, model.to(device).eval())
