"""Fixed calls that a careless kernel gets wrong, in every dtype."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.support.accuracy import assert_accurate
from tests.support.loss_calls import DTYPES, Call, make_generator, run

N_HEADS, BATCH, SEQ, WIDTH, VOCAB = 3, 2, 9, 13, 131

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "smoothing": {"label_smoothing": 0.1},
    "only smoothing": {"label_smoothing": 1.0},
    "z-loss": {"z_loss": 1e-2},
    "softcap": {"softcap": 3.0, "logit_scale": 0.5},
    "negative scale": {"logit_scale": -2.0},
    "chunks of one row": {"chunk_rows": 1},
    "workspace of one row": {"workspace_bytes": 1},
    "token count": {"normalizer": 100},
    "token count in a tensor": {"normalizer": torch.tensor(99.7, dtype=torch.float64)},
    "detached": {"detach_weight": (1, 3)},
    "a class is ignored": {"ignore_index": 5},
    "everything": {
        "reduction": "none",
        "label_smoothing": 0.2,
        "z_loss": 1e-2,
        "softcap": 5.0,
        "logit_scale": 1.5,
        "chunk_rows": 7,
        "detach_weight": (2,),
    },
}
SHAPES = {
    "no rows": (0, 5, 8, 33),
    "no positions": (2, 0, 8, 33),
    "one row": (1, 1, 8, 33),
    "one class": (2, 3, 8, 1),
    "width 1": (2, 3, 1, 33),
    "one above a block": (2, 3, 8, 1025),
    "prime": (3, 5, 7, 4099),
}


def make_call(
    dtype: torch.dtype,
    *,
    shape: tuple[int, int, int, int] = (BATCH, SEQ, WIDTH, VOCAB),
    vectors: bool = False,
    **options: Any,
) -> Call:
    batch, seq, width, vocab = shape
    g = make_generator(0)
    tensors = {
        "hidden": torch.randn(N_HEADS, batch, seq, width, generator=g, dtype=torch.float64),
        "weight": torch.randn(vocab, width, generator=g, dtype=torch.float64),
        "labels": torch.randint(vocab, (batch, seq + N_HEADS), generator=g),
    }
    tensors["labels"][torch.rand(tensors["labels"].shape, generator=g) < 0.2] = options.get("ignore_index", -100)
    if vectors:
        tensors |= {
            "bias": torch.randn(vocab, generator=g, dtype=torch.float64),
            "class_weights": torch.rand(vocab, generator=g, dtype=torch.float64) + 0.5,
            "token_weights": torch.rand(tensors["labels"].shape, generator=g, dtype=torch.float64),
            "head_weights": torch.tensor([1.0, 0.5, 0.3], dtype=torch.float64),
        }
    return Call(dtype, tensors, {"reduction": "mean"} | options, heads=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape: str, dtype: torch.dtype) -> None:
    assert_accurate(make_call(dtype, shape=SHAPES[shape]))


@pytest.mark.slow
@pytest.mark.parametrize("ignored", [False, True], ids=["", "some ignored"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_threads_share_out(dtype: torch.dtype, ignored: bool) -> None:
    """Each thread takes its part of a chunk of short rows through the products by itself, and columns of the last."""
    call = make_call(dtype, shape=(3, 101, 1030, 40), vectors=ignored)
    if not ignored:
        call.tensors["labels"].clamp_(min=0)
    threads = torch.get_num_threads()
    for count in (2, 3):
        torch.set_num_threads(count)
        assert_accurate(call)
    torch.set_num_threads(threads)


@pytest.mark.parametrize("vectors", [False, True], ids=["", "with vectors"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPTIONS)
def test_options(name: str, dtype: torch.dtype, vectors: bool) -> None:
    assert_accurate(make_call(dtype, vectors=vectors, **OPTIONS[name]))


@pytest.mark.parametrize("labels", ["all ignored", "one document per token", "int32"])
def test_labels(labels: str) -> None:
    call = make_call(torch.float32)
    if labels == "all ignored":
        call.tensors["labels"].fill_(-100)
    elif labels == "int32":
        call.tensors["labels"] = call.tensors["labels"].int()
    else:
        call.tensors["document_ids"] = torch.arange(SEQ + N_HEADS).expand(BATCH, -1)
    assert_accurate(call)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_takes_float32_weights(dtype: torch.dtype) -> None:
    """The operands are rounded to the autocast dtype; gradients come back in the parameters' own."""
    call = make_call(dtype)
    with torch.autocast("cpu", dtype=dtype):
        ours = run(replace(call, dtype=torch.float32), torch.float32, ours=True)
    assert all(x.dtype == torch.float32 for x in (ours.values | ours.grads).values())
    assert_accurate(call, ours)
