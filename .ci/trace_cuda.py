"""Traces the CUDA path of the loss with fake CUDA tensors, on a CUDA build of torch and without a GPU.

A fake tensor has no values: what asks for one (``.item()``, ``.tolist()``, a mask as an index) raises here, as it would
make the host wait on a GPU. The shapes, dtypes and devices of everything in between are checked by torch itself.
"""

from __future__ import annotations

import itertools

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import mtp_ext
from mtp_ext.ops import rms_norm
from mtp_ext.ops import top_classes as decode
from mtp_ext.ops.loss.accumulator import HeadLossAccumulator
from mtp_ext.ops.loss.arguments import LossCall, Needs
from mtp_ext.ops.loss.options import RowOptions

BATCH, SEQ, WIDTH, VOCAB, HEADS = 3, 16, 32, 50, 2


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda")


def trace_operators(dtype: torch.dtype, smoothing: float, optional: dict[str, torch.Tensor]) -> None:
    """What runs inside of the fused operators."""
    class_weights = optional.pop("class_weights", None)
    call = LossCall(
        labels=empty(BATCH, SEQ + HEADS, dtype=torch.int64),
        seq_len=SEQ,
        n_heads=HEADS,
        first_shift=1,
        compute_dtype=dtype,
        options=RowOptions(label_smoothing=smoothing, class_weights=class_weights),
        head_weights=empty(HEADS),
        chunk_rows=20,
        max_valid=[BATCH * SEQ // 2] * HEADS,
        **optional,
    )
    accumulator = HeadLossAccumulator(call, empty(VOCAB, WIDTH, dtype=dtype), Needs(True, True, "bias" in optional))
    (grads,) = accumulator.add_all([empty(HEADS, BATCH, SEQ, WIDTH, dtype=dtype)])
    result = accumulator.result()
    assert grads is not None and grads.shape == (HEADS, BATCH, SEQ, WIDTH) and grads.is_cuda
    assert accumulator.grad_weight is not None and accumulator.grad_weight.dtype == torch.float32
    assert result.loss.is_cuda and result.loss.dtype == torch.float32
    try:
        result.n_valid.tolist()
    except DataDependentOutputException:
        return
    raise AssertionError("a fake tensor gave a value: this trace proves nothing")


def trace_public_functions(dtype: torch.dtype) -> None:
    with torch.no_grad():
        result = mtp_ext.multi_token_cross_entropy(
            empty(HEADS, BATCH, SEQ, WIDTH, dtype=dtype),
            empty(VOCAB, WIDTH, dtype=dtype),
            empty(BATCH, SEQ + HEADS, dtype=torch.int64),
        )
        assert result.loss.is_cuda and result.head_loss.shape == (HEADS,)
        best = decode.top_classes(empty(5, WIDTH, dtype=dtype), empty(VOCAB, WIDTH, dtype=dtype), 3)
        x = empty(5, WIDTH, dtype=dtype)
        normed = rms_norm.rms_norm_heads(x, empty(HEADS, WIDTH), 1e-5)
        assert normed.shape == (HEADS, 5, WIDTH) and normed.is_cuda and rms_norm.uses_kernel(x, empty(WIDTH))
        assert best.ids.shape == best.logits.shape == (5, 3) and best.lse.is_cuda


def main() -> None:
    optional = {
        "token_weights": lambda: empty(BATCH, SEQ + HEADS),
        "class_weights": lambda: empty(VOCAB),
        "bias": lambda: empty(VOCAB),
        "document_ids": lambda: empty(BATCH, SEQ + HEADS, dtype=torch.int64),
    }
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    with FakeTensorMode():
        for dtype, smoothing in itertools.product(dtypes, (0.0, 0.1)):
            trace_operators(dtype, smoothing, {})
            trace_operators(dtype, smoothing, {name: make() for name, make in optional.items()})
        for dtype in dtypes:
            trace_public_functions(dtype)
    print("Fake CUDA tensors: the loss and the decoding trace, and no value is read on the host")


if __name__ == "__main__":
    main()
