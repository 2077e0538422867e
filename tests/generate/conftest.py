"""Prompts of different lengths for the tests of decoding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

VOCAB_SIZE = 11
LENGTHS = (5, 1, 9, 5)


@pytest.fixture
def prompts() -> list[Tensor]:
    return [torch.randint(VOCAB_SIZE, (n,)) for n in LENGTHS]
