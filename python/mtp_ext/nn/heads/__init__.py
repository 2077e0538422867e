"""The prediction heads and their unembedding."""

from mtp_ext.nn.heads.head import Head
from mtp_ext.nn.heads.heads import Heads

__all__ = ["Head", "Heads"]
