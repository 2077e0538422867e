"""Heads on causal language models of Hugging Face's transformers: the documented import path."""

from mtp_ext.nn.interop.huggingface import from_huggingface, load_huggingface, save_huggingface

__all__ = ["from_huggingface", "load_huggingface", "save_huggingface"]
