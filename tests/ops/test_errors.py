"""Every wrong argument: the error's type, the argument's name, what was expected and what came, before any work."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import mtp_ext
from mtp_ext import linear_cross_entropy, multi_token_cross_entropy
from mtp_ext.ops.common.backend import backend_of

N, B, S, D, V = 2, 3, 5, 8, 11


def good() -> dict[str, Any]:
    return {
        "hidden": torch.randn(N, B, S, D),
        "weight": torch.randn(V, D),
        "labels": torch.randint(V, (B, S + N)),
    }


def good_rows() -> dict[str, Any]:
    return {"hidden": torch.randn(B, S, D), "weight": torch.randn(V, D), "targets": torch.randint(V, (B, S))}


def with_label(value: int) -> torch.Tensor:
    labels = torch.zeros(B, S + N, dtype=torch.int64)
    labels[1, 2] = value
    return labels


BOTH: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "hidden of integers": ({"hidden": torch.ones(N, B, S, D, dtype=torch.int64)}, TypeError, r"hidden .*int64"),
    "no tensor": ({"weight": [1.0]}, TypeError, r"weight must be a tensor .* got list"),
    "weight of another width": ({"weight": torch.randn(V, D + 1)}, ValueError, r"weight must be .*8.*\[11, 9\]"),
    "weight without classes": ({"weight": torch.randn(0, D)}, ValueError, r"weight must .*\[0, 8\]"),
    "weight of another dtype": ({"weight": torch.randn(V, D).double()}, TypeError, r"weight .*float32.*float64"),
    "weight on another device": ({"weight": torch.randn(V, D, device="meta")}, ValueError, r"weight .*cpu.*meta"),
    "bias of another length": (
        {"bias": torch.randn(V + 1)},
        ValueError,
        r"bias must have shape \[V\] = \[11\].*\[12\]",
    ),
    "class weights of integers": ({"class_weights": torch.ones(V, dtype=torch.int32)}, TypeError, "class_weights"),
    "smoothing": ({"label_smoothing": 1.5}, ValueError, r"label_smoothing must be in \[0, 1\], got 1.5"),
    "smoothing of text": ({"label_smoothing": "a"}, TypeError, r"label_smoothing must be a number, got str 'a'"),
    "z-loss": ({"z_loss": -1.0}, ValueError, "z_loss must be finite and not negative, got -1.0"),
    "softcap": ({"softcap": 0.0}, ValueError, "softcap must be positive and finite, or None, got 0.0"),
    "softcap of text": ({"softcap": "30"}, TypeError, "softcap must be a number or None"),
    "a truth for a number": ({"logit_scale": True}, TypeError, "logit_scale must be a number, got"),
    "scale": ({"logit_scale": float("nan")}, ValueError, "logit_scale must be finite, got nan"),
    "reduction": ({"reduction": "avg"}, ValueError, "reduction must be one of mean, sum, none, got 'avg'"),
    "chunk of nothing": ({"chunk_rows": 0}, ValueError, "chunk_rows must be at least 1, got 0"),
    "chunk of a half": ({"chunk_rows": 0.5}, TypeError, "chunk_rows must be an int or None"),
    "workspace": ({"workspace_bytes": -1}, ValueError, "workspace_bytes must be at least 1, got -1"),
    "bound below nothing": ({"max_valid": -1}, ValueError, "max_valid must not be negative, got -1"),
    "bound of a half": ({"max_valid": 0.5}, TypeError, "max_valid must be an int"),
    "bound of nobody": ({"max_valid": [5, 5, 5]}, ValueError, r"max_valid must hold n = \d ints, got 3"),
    "bound below the targets": (
        {"max_valid": 2},
        ValueError,
        "max_valid must be at least .* got 2 for the 15 of head 1",
    ),
    "ignore_index": ({"ignore_index": None}, TypeError, "ignore_index must be an int"),
    "buffer of another shape": ({"grad_weight_out": torch.zeros(V, D + 1)}, ValueError, "grad_weight_out"),
    "buffer of another dtype": ({"grad_weight_out": torch.zeros(V, D).half()}, TypeError, "grad_weight_out .*float32"),
    "buffer of columns": ({"grad_weight_out": torch.zeros(D, V).T}, ValueError, "grad_weight_out must be contiguous"),
    "buffer with a graph": (
        {"grad_weight_out": torch.zeros(V, D, requires_grad=True)},
        ValueError,
        "grad_weight_out must not require grad",
    ),
    "group": ({"group": "world"}, TypeError, "group must be a torch.distributed process group"),
}
HEADS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "hidden of three dimensions": ({"hidden": torch.randn(B, S, D)}, ValueError, r"hidden must be \[n, B, S, D\]"),
    "no head": ({"hidden": []}, ValueError, "at least one head"),
    "no stacked head": ({"hidden": torch.randn(0, B, S, D)}, ValueError, "at least one head"),
    "heads of two shapes": ({"hidden": [torch.randn(B, S, D), torch.randn(B, S + 1, D)]}, ValueError, r"hidden\[1\]"),
    "heads of two dtypes": ({"hidden": [torch.randn(B, S, D), torch.randn(B, S, D).half()]}, TypeError, r"hidden\[1\]"),
    "labels too short": ({"labels": torch.zeros(B, S - 1, dtype=torch.int64)}, ValueError, r"labels must .*\[3, 4\]"),
    "labels of another batch": ({"labels": torch.zeros(B + 1, S, dtype=torch.int64)}, ValueError, "labels must"),
    "labels of floats": ({"labels": torch.zeros(B, S)}, TypeError, "labels .*int64 or int32.*float32"),
    "a label too large": (
        {"labels": with_label(V)},
        ValueError,
        r"targets must be in \[0, 11\).*got 11 at index \[1, 2\]",
    ),
    "a negative label": ({"labels": with_label(-1)}, ValueError, r"got -1 at index \[1, 2\]"),
    "documents": ({"document_ids": torch.zeros(B, S, dtype=torch.int64)}, ValueError, "document_ids must have shape"),
    "token weights": ({"token_weights": torch.zeros(B, S)}, ValueError, "token_weights must have shape"),
    "head weights": ({"head_weights": [1.0]}, ValueError, "head_weights must hold n = 2 numbers, got 1"),
    "head weights tensor": ({"head_weights": torch.ones(3)}, ValueError, r"head_weights must have shape \[n\] = \[2\]"),
    "normalizer": ({"normalizer": "tokens"}, ValueError, "normalizer must be 'per_head'"),
    "normalizer vector": ({"normalizer": torch.ones(2)}, ValueError, "normalizer must be 0-d"),
    "complex normalizer": ({"normalizer": torch.tensor(1j)}, TypeError, "normalizer must be 0-d of dtype .*complex64"),
    "normalizer of a truth": ({"normalizer": True}, TypeError, "normalizer must be 'per_head', a number"),
    "detached head": ({"detach_weight": (3,)}, ValueError, r"detach_weight must hold heads in 1..2, got 3"),
    "replicated for other heads": ({"weight": torch.randn(3, V, D)}, ValueError, r"weight must be .*n = 2"),
}
ROWS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "hidden of nothing": ({"hidden": torch.tensor(1.0)}, ValueError, r"hidden must be \[..., D\]"),
    "targets of another shape": ({"targets": torch.zeros(B, dtype=torch.int64)}, ValueError, "targets must have shape"),
    "targets of floats": ({"targets": torch.zeros(B, S)}, TypeError, "targets .*int64 or int32"),
    "a target too large": ({"targets": torch.full((B, S), V)}, ValueError, r"targets must be in \[0, 11\)"),
    "token weights": ({"token_weights": torch.zeros(B)}, ValueError, "token_weights must have shape"),
}


@pytest.mark.parametrize("name", BOTH)
def test_both_functions(name: str) -> None:
    change, error, match = BOTH[name]
    with pytest.raises(error, match=match):
        multi_token_cross_entropy(**good() | change)
    if "hidden" not in change:
        with pytest.raises(error, match=match):
            linear_cross_entropy(**good_rows() | change)


@pytest.mark.parametrize("name", HEADS)
def test_n_heads(name: str) -> None:
    change, error, match = HEADS[name]
    with pytest.raises(error, match=match):
        multi_token_cross_entropy(**good() | change)


@pytest.mark.parametrize("name", ROWS)
def test_one_head(name: str) -> None:
    change, error, match = ROWS[name]
    with pytest.raises(error, match=match):
        linear_cross_entropy(**good_rows() | change)


@pytest.mark.skipif(mtp_ext.build_info()["cuda"], reason="this build has CUDA kernels")
def test_a_device_without_kernels_is_named() -> None:
    with pytest.raises(RuntimeError, match=r"no kernels for cuda tensors.*MTP_EXT_CUDA=1"):
        backend_of(torch.device("cuda")).check_built()


def test_distributed_tensors_are_refused_with_the_fix() -> None:
    from torch.distributed import destroy_process_group, init_process_group
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor
    from torch.testing._internal.distributed.fake_pg import FakeStore

    init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        sharded = distribute_tensor(torch.randn(V + 1, D), init_device_mesh("cpu", (2,)))
        with pytest.raises(TypeError, match=r"weight must be a local tensor .*grad_placements"):
            linear_cross_entropy(**good_rows() | {"weight": sharded})
    finally:
        destroy_process_group()
