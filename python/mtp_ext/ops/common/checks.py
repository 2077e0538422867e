"""Argument checks, run before any work. Messages name the argument, what it must be and what was passed."""

from __future__ import annotations

import math
import numbers
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from mtp_ext.ops.common.backend import backend_of, can_read
from mtp_ext.ops.common.runtime import debug_checks_enabled, is_dtensor

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INDEX_DTYPES = (torch.int64, torch.int32)
REDUCTIONS = ("mean", "sum", "none")


def describe(x: object) -> str:
    """Describes a value for an error message: ``float32 [2, 3] on cpu``."""
    if isinstance(x, Tensor):
        return f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)} on {x.device}"
    return f"{type(x).__name__} {x!r}" if isinstance(x, (int, float, str)) else type(x).__name__


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return " or ".join(str(d).removeprefix("torch.") for d in dtypes)


def check_tensor(
    name: str, x: object, *, dtypes: Sequence[torch.dtype], shape: str, device: torch.device | None = None
) -> None:
    """Raises TypeError unless ``x`` is a plain tensor of one of ``dtypes``, ValueError if it is on another device."""
    if is_dtensor(x):
        raise TypeError(
            f"{name} must be a local tensor {shape}, got a DTensor. Of a module that FSDP2 shards, call unshard() and "
            f"pass its parameter again; or pass {name}.full_tensor(grad_placements=[Partial('avg')]): without "
            "grad_placements each process keeps its own gradient"
        )
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor {shape} of {_names(dtypes)}, got {describe(x)}")
    if x.dtype not in dtypes:
        raise TypeError(f"{name} must be {shape} of dtype {_names(dtypes)}, got {describe(x)}")
    if x.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor {shape}, got {x.layout}: pass {name}.to_dense()")
    if device is not None and x.device != device:
        raise ValueError(f"{name} must be on {device} like hidden, got {describe(x)}")


def holds(comparison: bool) -> bool:
    """Returns whether a comparison of sizes holds; sizes that depend on data are compared when the graph runs."""
    if not torch.compiler.is_compiling():
        return comparison
    from torch.fx.experimental.symbolic_shapes import guard_or_true  # imports sympy

    if not guard_or_true(comparison):
        return False
    torch._check(comparison)  # type: ignore[no-untyped-call]
    return True


def check_shape(name: str, x: Tensor, expected: Sequence[int], meaning: str) -> None:
    """Raises ValueError unless ``x.shape`` is ``expected``."""
    if x.dim() != len(expected) or not all(holds(a == b) for a, b in zip(x.shape, expected, strict=True)):
        raise ValueError(f"{name} must have shape {meaning} = {list(expected)}, got {describe(x)}")


def check_vector(
    name: str, x: Tensor | None, size: int, meaning: str, dtypes: Sequence[torch.dtype], device: torch.device
) -> None:
    """Checks an optional ``[size]`` tensor."""
    if x is None:
        return
    check_tensor(name, x, dtypes=dtypes, shape=f"[{meaning}]", device=device)
    check_shape(name, x, [size], f"[{meaning}]")


def check_constant(name: str, x: object) -> None:
    """Raises ValueError if ``x`` is a tensor that would need a gradient; the loss computes none for it."""
    if isinstance(x, Tensor) and x.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} must not require grad, because the loss gives it no gradient: pass {name}.detach()")


def checked_items(name: str, x: object, expected: str) -> tuple[Any, ...]:
    """Returns the items of a collection that is no text."""
    if isinstance(x, (str, bytes, dict)) or not isinstance(x, Iterable):
        raise TypeError(f"{name} must hold {expected}, got {describe(x)}")
    return tuple(x)


def check_token_range(name: str, ids: Tensor, vocab_size: int) -> None:
    """Raises ValueError for a token id outside ``[0, V)``, where the host can read it."""
    if can_read(ids) and ids.numel() > 0:
        low, high = (int(x) for x in ids.aminmax())
        if low < 0 or high >= vocab_size:
            raise ValueError(f"{name} must be in [0, {vocab_size}), got values from {low} to {high}")


def check_labels(labels: Tensor, batch: int, seq_len: int, device: torch.device) -> None:
    """Checks unshifted labels ``[B, S']`` for ``[B, S]`` positions."""
    check_tensor("labels", labels, dtypes=INDEX_DTYPES, shape="[B, S']", device=device)
    if labels.dim() != 2 or not (holds(labels.shape[0] == batch) and holds(labels.shape[1] >= seq_len)):
        raise ValueError(
            f"labels must be [B, S'] with B = {batch} and S' >= S = {seq_len} (unshifted; S + n loses no target), got "
            f"{describe(labels)}"
        )


def check_like_labels(labels: Tensor, document_ids: Tensor | None, token_weights: Tensor | None) -> None:
    """Checks the optional tensors that have one entry per label."""
    optional = (("document_ids", document_ids, INDEX_DTYPES), ("token_weights", token_weights, FLOAT_DTYPES))
    for name, x, dtypes in optional:
        if x is not None:
            check_tensor(name, x, dtypes=dtypes, shape="[B, S']", device=labels.device)
            check_shape(name, x, labels.shape, "[B, S'] of labels")


def check_int(name: str, x: object, or_none: str = "") -> None:
    """Raises TypeError unless ``x`` is an int."""
    if isinstance(x, bool) or not isinstance(x, (numbers.Integral, torch.SymInt)):
        raise TypeError(f"{name} must be an int{or_none}, got {describe(x)}")
    if not isinstance(x, torch.SymInt) and not -(2**63) <= int(x) < 2**63:
        raise ValueError(f"{name} must fit in 64 bits, got {x}")


def check_positive_int(name: str, x: int | None) -> None:
    """Checks an optional int of at least 1."""
    if x is None:
        return
    check_int(name, x, " or None")
    if x < 1:
        raise ValueError(f"{name} must be at least 1, got {x}")


def check_reduction(reduction: object) -> None:
    """Raises ValueError for an unknown reduction."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")


def check_group(group: object) -> None:
    """Raises TypeError unless ``group`` is a process group or None."""
    if group is not None and not (
        torch.distributed.is_available() and isinstance(group, torch.distributed.ProcessGroup)
    ):
        raise TypeError(f"group must be a torch.distributed process group or None, got {describe(group)}")


def check_number(name: str, x: object, or_none: str = "") -> None:
    """Raises TypeError unless ``x`` is a float or an int."""
    if isinstance(x, bool) or not isinstance(x, (numbers.Real, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{name} must be a number{or_none}, got {describe(x)}")


def python_number(x: Any) -> Any:
    """Returns numbers of other libraries (numpy's) as Python's, which operators take; others as they are."""
    if isinstance(x, (int, float)) or not isinstance(x, numbers.Real):
        return x
    return int(x) if isinstance(x, numbers.Integral) else float(x)


def check_same_dtype(hidden_dtype: torch.dtype, name: str, x: Tensor, autocast: bool) -> None:
    """Raises TypeError if ``x`` differs from hidden's dtype outside autocast."""
    if not autocast and x.dtype != hidden_dtype:
        expected = str(hidden_dtype).removeprefix("torch.")
        raise TypeError(f"{name} must have hidden's dtype {expected} outside autocast, got {describe(x)}")


def check_targets_in_range(labels: Tensor, first_invalid: Tensor, vocab_size: int, ignore_index: int) -> None:
    """Raises ValueError for a label that is not a class; on a GPU only with debug checks, because it syncs."""
    if can_read(first_invalid) or debug_checks_enabled():
        check_first_invalid(int(first_invalid.item()), labels, vocab_size, ignore_index)


def check_first_invalid(at: int, labels: Tensor, vocab_size: int, ignore_index: int) -> None:
    """Raises ValueError if ``at``, the flat index into ``labels`` of the first invalid label, is not -1."""
    if at >= 0:
        b, j = divmod(at, labels.shape[1])
        raise ValueError(
            f"targets must be in [0, {vocab_size}) or equal to ignore_index={ignore_index}, got {int(labels[b, j])} at "
            f"index [{b}, {j}]"
        )


def check_max_valid(n_valid: Tensor, max_valid: Sequence[int] | None) -> None:
    """Raises ValueError if a head has more than ``max_valid`` targets; on a GPU only with debug checks."""
    if max_valid is None or not (can_read(n_valid) or debug_checks_enabled()):
        return
    for k, (count, limit) in enumerate(zip(n_valid.tolist(), max_valid, strict=True), 1):
        if count > limit:
            raise ValueError(
                f"max_valid must be at least the number of targets, got {limit} for the {count} of head {k}"
            )


def check_grad_weight_out(buffer: Tensor | None, weight: Tensor) -> None:
    """Checks ``grad_weight_out``: float32 (float64 for float64), contiguous, and outside any autograd graph."""
    if buffer is None:
        return
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    check_tensor("grad_weight_out", buffer, dtypes=(dtype,), shape="of weight's shape", device=weight.device)
    check_shape("grad_weight_out", buffer, weight.shape, "that of weight")
    if not buffer.is_contiguous():
        raise ValueError(f"grad_weight_out must be contiguous, got strides {list(buffer.stride())}")
    if buffer.requires_grad:
        raise ValueError("grad_weight_out must not require grad: backward adds to it in place")


def checked_head_weights(
    head_weights: Tensor | Sequence[float] | None, n_heads: int, device: torch.device
) -> Tensor | None:
    """Returns ``head_weights`` as a tensor ``[n]``; a tensor is returned as is, so that it can get a gradient."""
    if head_weights is None:
        return None
    if isinstance(head_weights, Tensor):
        check_vector("head_weights", head_weights, n_heads, "n", (torch.float32, torch.float64), device)
        return head_weights
    weights = checked_items("head_weights", head_weights, f"{n_heads} numbers or a tensor [n]")
    for weight in weights:
        check_constant("head_weights", weight)
        check_number("head_weights", weight.item() if isinstance(weight, Tensor) and weight.dim() == 0 else weight)
    if len(weights) != n_heads:
        raise ValueError(f"head_weights must hold n = {n_heads} numbers, got {len(weights)}")
    values = [float(weight) for weight in weights]
    return backend_of(device).constants(values, torch.float64, device)


def checked_normalizer(normalizer: object) -> str | float | Tensor:
    """Returns ``"per_head"``, or what :func:`checked_positive` does."""
    if not isinstance(normalizer, str):
        return checked_positive("normalizer", normalizer, "'per_head', ")
    if normalizer != "per_head":
        raise ValueError(f"normalizer must be 'per_head', a number or a 0-d tensor, got {normalizer!r}")
    return normalizer


def checked_grad_scale(grad_scale: object, buffer: Tensor | None, reduction: str) -> float | Tensor | None:
    """Checks ``grad_scale`` together with ``grad_weight_out`` and the reduction."""
    if grad_scale is None:
        return None
    if buffer is None:
        raise ValueError("grad_scale must be None without grad_weight_out, the buffer that the gradient is added to")
    if reduction == "none":
        raise ValueError("grad_scale must be None with reduction='none' or return_lse, whose gradients need backward")
    return checked_positive("grad_scale", grad_scale)


def checked_positive(name: str, x: object, instead: str = "") -> float | Tensor:
    """Returns a positive and finite float or 0-d tensor; of a GPU's tensor the value is not read.

    Args:
        name: The argument's name.
        x: Its value.
        instead: What else it may be, for the errors.
    """
    if isinstance(x, Tensor):
        check_tensor(name, x, dtypes=(*FLOAT_DTYPES, *INDEX_DTYPES), shape="0-d")
        if x.dim() != 0:
            raise ValueError(f"{name} must be 0-d where it is a tensor, got {describe(x)}")
        if can_read(x):
            check_positive(name, x)
        return x
    if isinstance(x, bool) or not isinstance(x, numbers.Real):
        raise TypeError(f"{name} must be {instead}a number or a 0-d tensor, got {describe(x)}")
    check_positive(name, x)
    return float(x)


def check_positive(name: str, x: numbers.Real | Tensor) -> None:
    """Raises ValueError unless ``x`` is positive and finite; a GPU's tensor is read only with debug checks."""
    if isinstance(x, Tensor) and not (can_read(x) or debug_checks_enabled()):
        return
    value = float(x.item() if isinstance(x, Tensor) else x)
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value:g}")


def checked_max_valid(max_valid: int | Sequence[int] | None, n_heads: int) -> list[int] | None:
    """Returns one bound per head, from ``n`` bounds or one for all."""
    if max_valid is None:
        return None
    several = isinstance(max_valid, Sequence) and not isinstance(max_valid, bytes)
    limits = [python_number(x) for x in (max_valid if several else [max_valid] * n_heads)]  # type: ignore[union-attr]
    for limit in limits:
        check_int("max_valid", limit, f", {n_heads} ints or None")
        if limit < 0:
            raise ValueError(f"max_valid must not be negative, got {limit}")
    if len(limits) != n_heads:
        raise ValueError(f"max_valid must hold n = {n_heads} ints, got {len(limits)}")
    return limits


def checked_heads(name: str, heads: Collection[int], n_heads: int) -> frozenset[int]:
    """Returns the 1-based heads as a set."""
    for k in checked_items(name, heads, f"heads in 1..{n_heads}"):
        if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= n_heads:
            raise ValueError(f"{name} must hold heads in 1..{n_heads}, got {k!r}")
    return frozenset(heads)
