"""Saves and loads what makes a checkpoint self-contained: model and run configurations, and the tokenizer."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from mtp_ext.nn import MTPConfig, MTPModel
from mtp_ext.train.checkpoint.directory import Checkpoint, load_model_state, resolve_checkpoint
from mtp_ext.train.config import TrainConfig
from mtp_ext.train.config_file import read_config, write_config
from mtp_ext.train.data import DataConfig, Dataset, Tokenizer, load_tokenizer
from mtp_ext.train.data.earlier import ChangedCorpusError, EarlierCorpus, find_again
from mtp_ext.train.data.sources import MissingSourceError

MODEL_CONFIG_FILE = "model.json"
TOKENIZER_DIRECTORY = "tokenizer"
DATASET_FILE = "dataset.json"


@dataclass(frozen=True)
class SavedModel:
    """A model from a checkpoint, ready to run.

    Attributes:
        checkpoint: The checkpoint that it was loaded from.
        config: The configuration of its run.
        tokenizer: Its tokenizer.
        model: The model, on its device, in evaluation mode.
    """

    checkpoint: Checkpoint
    config: TrainConfig
    tokenizer: Tokenizer
    model: MTPModel


def write_description(directory: Path, config: TrainConfig, model: MTPConfig, dataset: Dataset) -> None:
    """Writes everything in a checkpoint except its tensors."""
    write_config(config, directory)
    (directory / MODEL_CONFIG_FILE).write_text(json.dumps(model.to_dict(), indent=2) + "\n", encoding="utf-8")
    (directory / DATASET_FILE).write_text(json.dumps(dataset.manifest, indent=2) + "\n", encoding="utf-8")
    (directory / TOKENIZER_DIRECTORY).mkdir()
    dataset.tokenizer.save(directory / TOKENIZER_DIRECTORY)


def find_dataset(checkpoint: Checkpoint, config: DataConfig, cache: Path, remedy: str) -> Dataset:
    """Opens the corpus that a checkpoint was trained on, wherever it is now.

    Args:
        checkpoint: The checkpoint.
        config: The corpus, with the sources as they are named now.
        cache: Directory of tokenised corpora.
        remedy: The end of the error message: what to do.
    Raises:
        ValueError: It is not there, or corpus, split or tokenizer are others now.
    """
    path = checkpoint.path / DATASET_FILE
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        fingerprint, inputs = manifest["fingerprint"], manifest["inputs"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"checkpoint: {path} cannot be read ({error})") from None
    earlier = EarlierCorpus(fingerprint, inputs, load_tokenizer(checkpoint.path / TOKENIZER_DIRECTORY))
    try:
        return find_again(config, cache, earlier)
    except (MissingSourceError, ChangedCorpusError) as error:
        raise ValueError(f"checkpoint: cannot find the corpus of {checkpoint.path}: {error}; {remedy}") from None


def read_model_config(checkpoint: Checkpoint) -> MTPConfig:
    """Reads the model's configuration from a checkpoint.

    Raises:
        ValueError: It is missing or damaged.
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
        device: The device of the model.
    Raises:
        ValueError: There is no complete checkpoint, or it does not fit this version's model.
    """
    checkpoint = resolve_checkpoint(path)
    model = MTPModel(read_model_config(checkpoint))
    try:
        model.load_state_dict(load_model_state(checkpoint))
    except RuntimeError as error:
        raise ValueError(f"checkpoint: {checkpoint.path} does not fit its own {MODEL_CONFIG_FILE} ({error})") from None
    config, tokenizer = read_config(checkpoint.path), load_tokenizer(checkpoint.path / TOKENIZER_DIRECTORY)
    return SavedModel(checkpoint, config, tokenizer, model.to(device).eval())
