"""Checks of a model's inputs. Values are checked only on the CPU, where it is free, and outside compiled graphs."""

from __future__ import annotations

from torch import Tensor, nn

from mtp_ext.nn.config import MTPConfig
from mtp_ext.ops.common.checks import INDEX_DTYPES, check_tensor, check_token_range, describe


def check_tokens(tokens: Tensor, config: MTPConfig, *, past: int = 0) -> None:
    """Checks token ids ``[B, S]`` that follow ``past`` cached ones."""
    check_tensor("tokens", tokens, dtypes=INDEX_DTYPES, shape="[B, S]")
    if tokens.dim() != 2:
        raise ValueError(f"tokens must be [B, S], got {describe(tokens)}")
    if past + tokens.shape[1] > config.max_seq_len:
        before = f" after {past} cached ones" if past else ""
        raise ValueError(f"tokens must be at most max_seq_len={config.max_seq_len} long, got {tokens.shape[1]}{before}")
    check_token_range("tokens", tokens, config.vocab_size)


def check_document_ids(document_ids: Tensor, tokens: Tensor) -> None:
    """Checks that ``document_ids`` are ``[B, S']``, ``S' >= S``, for ``tokens [B, S]``."""
    check_tensor("document_ids", document_ids, dtypes=INDEX_DTYPES, shape="[B, S']", device=tokens.device)
    batch, seq_len = tokens.shape[:2]
    if document_ids.dim() != 2 or document_ids.shape[0] != batch or document_ids.shape[1] < seq_len:
        raise ValueError(
            f"document_ids must be [B, S'] with B = {batch} and S' >= S = {seq_len}, got {describe(document_ids)}"
        )


def is_watched(module: nn.Module) -> bool:
    """Returns True if a module has hooks, a compiled call, or a forward that replaces its class's."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or "forward" in module.__dict__ or module._compiled_call_impl is not None
