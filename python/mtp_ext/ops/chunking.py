"""How many rows a chunk holds, and the three GEMMs of a chunk in the precision that the device is fast in."""

from __future__ import annotations

import functools
import platform

import torch
from torch import Tensor

# A chunk of logits that the caller did not size: 128 MiB, which is 1024 float32 rows at V = 32k.
DEFAULT_WORKSPACE_BYTES = 128 << 20
# Fewer rows leave the GEMMs inefficient (128 rows lose 20-40 %); more gain nothing on a CPU.
MIN_CHUNK_ROWS = 512
MAX_CHUNK_ROWS = 1024
# Rows of the weight that are widened at once where the CPU has no fast 16-bit GEMM.
WIDEN_TILE_ROWS = 4096


def chunk_size(
    n_rows: int, vocab_size: int, itemsize: int, *, chunk_rows: int | None, workspace_bytes: int | None
) -> int:
    """Rows of one chunk: what the caller asked for, else the default rule; balanced over the chunks.

    Args:
        n_rows: Rows in all.
        vocab_size: ``V``, the length of a row.
        itemsize: Bytes of one logit.
        chunk_rows: An upper limit in rows; takes precedence.
        workspace_bytes: An upper limit for the chunk's logits in bytes (at least one row is held).
    """
    if chunk_rows is not None:
        limit = chunk_rows
    elif workspace_bytes is not None:
        limit = max(1, workspace_bytes // max(1, vocab_size * itemsize))
    else:
        fits = DEFAULT_WORKSPACE_BYTES // max(1, vocab_size * itemsize)
        limit = min(MAX_CHUNK_ROWS, max(MIN_CHUNK_ROWS, fits))
    n_chunks = max(1, -(-n_rows // limit))
    return max(1, -(-n_rows // n_chunks))


@functools.cache
def has_fast_bfloat16_gemm() -> bool:
    """Whether this CPU multiplies bfloat16 natively; without it, torch's bfloat16 GEMM is 10-100 times slower."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return False
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


class ChunkGemms:
    """The products ``Z = H W^T``, ``dH = dZ W`` and ``dW += dZ^T H`` of one chunk.

    Logits have ``logits_dtype``: that of the operands where their GEMM is fast (bfloat16 on a GPU or a CPU with native
    support), else float32, with the 16-bit weight widened tile by tile. ``dW`` is always float32 (float64 for float64).

    Args:
        weight: ``[V, D]``.
        compute_dtype: What the operands are rounded to (the autocast dtype, or the inputs' own).
        full_precision_logits: Never hold logits in 16 bits.
    """

    def __init__(self, weight: Tensor, compute_dtype: torch.dtype, *, full_precision_logits: bool = False) -> None:
        native_16_bit = weight.device.type != "cpu" or (compute_dtype == torch.bfloat16 and has_fast_bfloat16_gemm())
        native_16_bit = native_16_bit and not full_precision_logits
        self.widens = compute_dtype.itemsize == 2 and not native_16_bit
        self.compute_dtype = compute_dtype
        self.logits_dtype = torch.float32 if self.widens else compute_dtype
        self.weight = weight if self.widens else weight.to(compute_dtype)
        vocab_size = weight.shape[0]
        tile = WIDEN_TILE_ROWS if compute_dtype.itemsize == 2 else max(1, vocab_size)
        self._tiles = [slice(v, min(v + tile, vocab_size)) for v in range(0, vocab_size, tile)]

    def _widened(self, tile: slice) -> Tensor:
        return self.weight[tile].to(self.compute_dtype).to(torch.float32)

    def logits(self, hidden: Tensor, out: Tensor) -> Tensor:
        """``out[c, v] = sum_d hidden[c, d] weight[v, d]``."""
        if not self.widens:
            return torch.mm(hidden, self.weight.t(), out=out)
        for tile in self._tiles:
            torch.mm(hidden, self._widened(tile).t(), out=out[:, tile])
        return out

    def grad_hidden(self, grad_logits: Tensor, out: Tensor) -> Tensor:
        """``out[c, d] = sum_v grad_logits[c, v] weight[v, d]``."""
        if not self.widens:
            return torch.mm(grad_logits, self.weight, out=out)
        if not self._tiles:  # an empty shard of the vocabulary
            return out.zero_()
        for i, tile in enumerate(self._tiles):
            torch.addmm(out, grad_logits[:, tile], self._widened(tile), beta=float(i > 0), out=out)
        return out

    def add_grad_weight(self, grad_logits: Tensor, hidden: Tensor, grad_weight: Tensor, *, accumulate: bool) -> None:
        """``grad_weight[v, d] (+)= sum_c grad_logits[c, v] hidden[c, d]``, in float32; written if not accumulated."""
        if grad_weight.dtype == grad_logits.dtype:
            beta = 1.0 if accumulate else 0.0  # beta 0 also ignores what uninitialised memory holds
            torch.addmm(grad_weight, grad_logits.t(), hidden, beta=beta, out=grad_weight)
            return
        # torch's CPU GEMM has no float32 output for bfloat16 operands: one tile of products at a time.
        for tile in self._tiles:
            product = torch.mm(grad_logits[:, tile].t(), hidden)
            if accumulate:
                grad_weight[tile] += product
            else:
                grad_weight[tile] = product
