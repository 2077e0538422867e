"""Text generation: decoding and sampling."""

from mtp_ext.generate.decoding import GenerationOutput, generate
from mtp_ext.generate.stats import DecodingStats

__all__ = ["DecodingStats", "GenerationOutput", "generate"]
