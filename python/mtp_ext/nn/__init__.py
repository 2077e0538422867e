"""Models with multi-token prediction heads (Gloeckle et al. 2024, arXiv 2404.19737)."""

from mtp_ext.nn.config import MTPConfig
from mtp_ext.nn.kv_cache import KVCache
from mtp_ext.nn.model import MTPModel

__all__ = ["KVCache", "MTPConfig", "MTPModel"]
