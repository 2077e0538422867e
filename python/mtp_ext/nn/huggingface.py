"""Public import path of :mod:`mtp_ext.nn.interop.huggingface`: heads on transformers' causal language models."""

from mtp_ext.nn.interop.huggingface import from_huggingface
from mtp_ext.nn.interop.huggingface_files import load_huggingface, save_huggingface

__all__ = ["from_huggingface", "load_huggingface", "save_huggingface"]
