"""What importing the package asks of torch."""

from __future__ import annotations

import subprocess
import sys

import pytest

WITHOUT_DTENSORS = """
import sys
sys.modules["torch.distributed.tensor"] = None  # importing it fails, as where torch is built without distributed
import torch
import mtp_ext, mtp_ext.generate, mtp_ext.nn
hidden, weight = torch.randn(4, 8, requires_grad=True), torch.randn(9, 8, requires_grad=True)
mtp_ext.linear_cross_entropy(hidden, weight, torch.tensor([1, 2, 3, 4]), label_smoothing=0.1).backward()
config = mtp_ext.nn.MTPConfig(vocab_size=9, d_model=8, n_layers=4, n_attn_heads=2, n_future=2, max_seq_len=16)
mtp_ext.nn.MTPModel(config)(torch.ones(1, 4, dtype=torch.int64), torch.ones(1, 6, dtype=torch.int64)).loss.backward()
"""


@pytest.mark.slow
def test_dtensors_are_not_imported() -> None:
    """They take longer to import than all of this package, and some builds of torch have none."""
    subprocess.run([sys.executable, "-c", WITHOUT_DTENSORS], check=True)
