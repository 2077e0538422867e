"""Models with multi-token prediction heads (Gloeckle et al. 2024, arXiv 2404.19737)."""

import torch

from mtp_ext.nn.composed import ComposedModel
from mtp_ext.nn.config import MTPConfig
from mtp_ext.nn.heads.head import Head
from mtp_ext.nn.interop.add_heads import add_heads
from mtp_ext.nn.interop.convert import convert
from mtp_ext.nn.model import MTPModel
from mtp_ext.nn.transformer.kv_cache import KVCache

torch.serialization.add_safe_globals([MTPConfig])

__all__ = ["ComposedModel", "Head", "KVCache", "MTPConfig", "MTPModel", "add_heads", "convert"]
