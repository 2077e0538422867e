"""How many rows a chunk holds, and the three GEMMs of a chunk in the precision that the device is fast in."""

from __future__ import annotations

import functools
import platform

import torch
from torch import Tensor

# A chunk of logits that the caller did not size: 128 MiB, which is 1024 float32 rows at V = 32k.
DEFAULT_WORKSPACE_BYTES = 128 << 20
# Fewer rows leave the GEMMs inefficient (128 rows lose 20-40 %); more gain nothing on a CPU, except 2 % where a chunk
# of short rows is small.
MIN_CHUNK_ROWS = 512
MAX_CHUNK_ROWS = 1024
SMALL_WORKSPACE_BYTES = 8 << 20
# A GPU needs more rows before the GEMMs outweigh the row pass and the float32 sum of the weight's gradient: with 760
# TFLOP/s and 3 TB/s those cost 167 / D and 333 / C of the GEMMs. Its tiles are 128 rows high.
GPU_SMALLEST_WORKSPACE_BYTES = 256 << 20
GPU_LARGEST_WORKSPACE_BYTES = 1 << 30
GPU_MIN_CHUNK_ROWS = 2048
GPU_MAX_CHUNK_ROWS = 8192
GPU_TILE_ROWS = 128
# Rows of the weight that are widened at once where the CPU has no fast 16-bit GEMM.
WIDEN_TILE_ROWS = 4096


def chunk_size(
    n_rows: int,
    vocab_size: int,
    itemsize: int,
    *,
    chunk_rows: int | None,
    workspace_bytes: int | None,
    gpu_width: int | None = None,
) -> int:
    """Rows of one chunk: what the caller asked for, else the default rule; balanced over the chunks.

    Args:
        n_rows: Rows in all.
        vocab_size: ``V``, the length of a row.
        itemsize: Bytes of one logit.
        chunk_rows: An upper limit in rows; takes precedence.
        workspace_bytes: An upper limit for the chunk's logits in bytes (at least one row is held).
        gpu_width: ``D``, where the rows are multiplied on a GPU.
    """
    if chunk_rows is not None:
        limit = chunk_rows
    elif workspace_bytes is not None:
        limit = max(1, workspace_bytes // max(1, vocab_size * itemsize))
    elif gpu_width is not None:
        return _gpu_chunk_size(n_rows, vocab_size, itemsize, gpu_width)
    else:
        row_bytes = max(1, vocab_size * itemsize)
        fits = DEFAULT_WORKSPACE_BYTES // row_bytes
        limit = max(min(MAX_CHUNK_ROWS, max(MIN_CHUNK_ROWS, fits)), SMALL_WORKSPACE_BYTES // row_bytes)
    n_chunks = max(1, -(-n_rows // limit))
    return max(1, -(-n_rows // n_chunks))


def _gpu_chunk_size(n_rows: int, vocab_size: int, itemsize: int, width: int) -> int:
    """The logits may take half of what the float32 gradient of the weight takes, within bounds; whole tiles."""
    half_of_gradient = vocab_size * width * 4 // 2
    workspace = max(GPU_SMALLEST_WORKSPACE_BYTES, min(GPU_LARGEST_WORKSPACE_BYTES, half_of_gradient))
    fits = workspace // max(1, vocab_size * itemsize)
    limit = min(GPU_MAX_CHUNK_ROWS, max(GPU_MIN_CHUNK_ROWS, fits)) // GPU_TILE_ROWS * GPU_TILE_ROWS
    n_chunks = max(1, -(-n_rows // limit))
    balanced = -(-n_rows // n_chunks)
    return max(1, min(n_rows, -(-balanced // GPU_TILE_ROWS) * GPU_TILE_ROWS))


@functools.cache
def has_fast_bfloat16_gemm() -> bool:
    """Whether this CPU multiplies bfloat16 natively; without it, torch's bfloat16 GEMM is 10-100 times slower."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return False
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def logits_dtype(device: torch.device, compute_dtype: torch.dtype, *, full_precision: bool = False) -> torch.dtype:
    """What logits are held in: the operands' dtype where its GEMM is fast, else float32.

    Args:
        device: Of the operands.
        compute_dtype: What they are rounded to.
        full_precision: Never in 16 bits.
    """
    if compute_dtype.itemsize != 2:
        return compute_dtype
    fast = device.type != "cpu" or (compute_dtype == torch.bfloat16 and has_fast_bfloat16_gemm())
    return compute_dtype if fast and not full_precision else torch.float32


class ChunkGemms:
    """The products ``Z = H W^T``, ``dH = dZ W`` and ``dW += dZ^T H`` of one chunk.

    Logits have ``logits_dtype``: that of the operands where their GEMM is fast (bfloat16 on a GPU or a CPU with native
    support), else float32, with the 16-bit weight widened tile by tile. ``dW`` is always float32 (float64 for float64).

    Args:
        weight: ``[V, D]``.
        compute_dtype: What the operands are rounded to (the autocast dtype, or the inputs' own).
        full_precision_logits: Never hold logits in 16 bits.
        gradient_unscale: Factor of the products with the gradient of the logits, where that was scaled up.
    """

    def __init__(
        self,
        weight: Tensor,
        compute_dtype: torch.dtype,
        *,
        full_precision_logits: bool = False,
        gradient_unscale: float = 1.0,
    ) -> None:
        self.compute_dtype = compute_dtype
        self.logits_dtype = logits_dtype(weight.device, compute_dtype, full_precision=full_precision_logits)
        self.widens = self.logits_dtype != compute_dtype
        # Of the gradient of hidden states: what is scaled back must not pass through float16.
        self.product_dtype = torch.float32 if self.logits_dtype == torch.float16 else self.logits_dtype
        self.gradient_unscale = gradient_unscale
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
        if out.dtype != grad_logits.dtype:
            torch.mm(grad_logits, self.weight, out_dtype=out.dtype, out=out)
            return out if self.gradient_unscale == 1.0 else out.mul_(self.gradient_unscale)
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
        if grad_logits.is_cuda:  # float32 sums, accumulated where they belong
            torch.addmm(
                grad_weight,
                grad_logits.t(),
                hidden,
                out_dtype=grad_weight.dtype,
                beta=1.0 if accumulate else 0.0,
                alpha=self.gradient_unscale,
                out=grad_weight,
            )
            return
        # torch's CPU GEMM has no float32 output for bfloat16 operands: one tile of products at a time.
        for tile in self._tiles:
            product = torch.mm(grad_logits[:, tile].t(), hidden)
            if accumulate:
                grad_weight[tile] += product
            else:
                grad_weight[tile] = product
