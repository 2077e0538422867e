"""Text generation: decoding and sampling."""

import torch

from mtp_ext.generate.decoding import GenerationOutput, generate
from mtp_ext.generate.stats import DecodingStats

torch.serialization.add_safe_globals([DecodingStats, GenerationOutput])

__all__ = ["DecodingStats", "GenerationOutput", "generate"]
