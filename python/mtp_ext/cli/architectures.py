"""Parameters and FLOPs of every head architecture at one shape."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from rich.table import Table

from mtp_ext.nn import MTPConfig
from mtp_ext.nn.variants import VARIANTS
from mtp_ext.train.checkpoint.directory import resolve_checkpoint
from mtp_ext.train.checkpoint.saved_model import read_model_config
from mtp_ext.train.config import TrainConfig
from mtp_ext.train.config_file import read_config, read_toml
from mtp_ext.train.data.tokenizer import ByteTokenizer, load_tokenizer

TABLE_WIDTH = 110


def read_shape(path: Path) -> tuple[MTPConfig, int]:
    """Reads a model's configuration and its training sequence length.

    Args:
        path: A TOML file as for ``mtp train --config``, or the directory of a checkpoint or of a run.
    Raises:
        ValueError: It cannot be read or does not describe a model.
    """
    if path.is_dir():
        checkpoint = resolve_checkpoint(path)
        return read_model_config(checkpoint), read_config(checkpoint.path).batch.seq_len
    config = read_toml(path, TrainConfig())
    return config.model.build(_vocab_size(config.data.tokenizer), config.batch.seq_len), config.batch.seq_len


def _vocab_size(tokenizer: str) -> int:
    """Returns the vocabulary size of a tokenizer, existing or to be learnt."""
    if tokenizer == "bytes":
        return ByteTokenizer.vocab_size
    if tokenizer.startswith("bpe:") and tokenizer[4:].isdigit():
        return int(tokenizer[4:])
    return load_tokenizer(Path(tokenizer)).vocab_size


def variants_of(config: MTPConfig) -> list[MTPConfig]:
    """Returns the configuration in every architecture that its layers allow, its own first."""
    found = [config]
    for variant in VARIANTS:
        if variant != config.variant:
            try:
                found.append(dataclasses.replace(config, variant=variant))
            except ValueError:  # fewer layers than the heads need
                continue
    return found


def architecture_table(config: MTPConfig, seq_len: int) -> Table:
    """Builds a table of the architectures' parameters and forward FLOPs; training takes three times the FLOPs.

    Args:
        config: The model's configuration.
        seq_len: Tokens per training sequence, which determines the FLOPs of attention.
    """
    table = Table(
        title=f"n = {config.n_future}, D = {config.d_model}, V = {config.vocab_size:,}, {config.n_layers} layers, "
        f"S = {seq_len}",
        title_justify="left",
        title_style="bold",
        box=None,
        pad_edge=False,
    )
    table.add_column("variant", no_wrap=True)
    for name in (
        "trunk layers",
        "M parameters",
        "trunk",
        "heads",
        "unembed",
        "MFLOP/token",
        "trunk",
        "heads",
        "unembed",
    ):
        table.add_column(name, justify="right")
    for each in variants_of(config):
        counts, flops = each.parameter_counts(), each.forward_flops(seq_len)
        table.add_row(
            f"{each.variant}{' *' if each == config else ''}",
            str(each.n_trunk_layers),
            *(f"{counts[part] / 1e6:.2f}" for part in ("total", "trunk", "heads", "unembed")),
            *(f"{flops[part] / 1e6:.2f}" for part in ("total", "trunk", "heads", "unembed")),
        )
    table.caption = "* as configured. Operations are those of a forward; a training step takes three times as many."
    table.caption_justify = "left"
    return table
