"""The prediction heads and their unembedding."""

from mtp_ext.nn.heads.heads import Head, Heads

__all__ = ["Head", "Heads"]
