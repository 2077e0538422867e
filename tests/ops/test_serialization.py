"""torch.save and torch.load, whose default refuses classes that it does not know, for what the package returns."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

from mtp_ext import MultiTokenLoss, RowOptions, multi_token_cross_entropy
from mtp_ext.generate import generate
from mtp_ext.nn import MTPConfig, MTPModel


def result() -> MultiTokenLoss:
    return multi_token_cross_entropy(torch.randn(2, 1, 4, 8), torch.randn(17, 8), torch.randint(17, (1, 6)))


OBJECTS: dict[str, Callable[[], Any]] = {
    "a result": result,
    "a result with a history": lambda: {"step": 3, "losses": [result(), result()]},
    "options": lambda: RowOptions(label_smoothing=0.1, class_weights=torch.rand(17)),
    "a configuration": lambda: MTPConfig.preset("1M", vocab_size=17),
    "a generation": lambda: generate(MTPModel(MTPConfig(17, 8, 4, 2)), torch.ones(2, 3, dtype=torch.int64), 4),
}


@pytest.mark.parametrize("name", OBJECTS)
def test_what_is_returned_can_be_saved_and_loaded(name: str) -> None:
    made, file = OBJECTS[name](), io.BytesIO()
    torch.save(made, file)
    file.seek(0)
    loaded = torch.load(file)
    assert type(loaded) is type(made) and repr(loaded) == repr(made)
    assert repr(pickle.loads(pickle.dumps(made))) == repr(made)
