"""The three GEMMs of a chunk, in the device's fast precision."""

from __future__ import annotations

import torch
from torch import Tensor

from mtp_ext.ops.common.backend import backend_of

# Rows of the weight that are widened at once on CPUs without a fast 16-bit GEMM: kTileRows of the native loss, too.
WIDEN_TILE_ROWS = 4096


class ChunkGemms:
    """The products ``Z = H W^T``, ``dH = dZ W`` and ``dW += dZ^T H`` of one chunk.

    Logits have ``logits_dtype``: the operand dtype if its GEMM is fast (bfloat16 on a GPU or a CPU with native
    support), else float32, with the 16-bit weight widened tile by tile. ``dW`` is summed in float32 (float64 for
    float64); a single chunk may store it in the weight's dtype at once.

    Args:
        weight: ``[V, D]``.
        compute_dtype: The dtype of the operands (the autocast dtype, or the inputs' own).
        sharded: The weight is a shard of the vocabulary; ranks sum its ``dH``, which is then float32.
    """

    def __init__(
        self,
        weight: Tensor,
        compute_dtype: torch.dtype,
        *,
        sharded: bool = False,
    ) -> None:
        self._backend = backend_of(weight.device)
        self.compute_dtype = compute_dtype
        logits_dtype = self._backend.shard_logits_dtype if sharded else self._backend.logits_dtype
        self.logits_dtype = logits_dtype(compute_dtype)
        self.widens = self.logits_dtype != compute_dtype
        # The gradient of the hidden states is unscaled in float32: it must not pass through float16.
        wide_products = sharded or self.logits_dtype == torch.float16
        self.product_dtype = (
            torch.promote_types(self.logits_dtype, torch.float32) if wide_products else self.logits_dtype
        )
        self.weight = weight if self.widens else weight.to(compute_dtype)
        vocab_size = weight.shape[0]
        tile = WIDEN_TILE_ROWS if compute_dtype.itemsize == 2 else max(1, vocab_size)
        self._tiles = [slice(v, min(v + tile, vocab_size)) for v in range(0, vocab_size, tile)]

    def _widened(self, tile: slice) -> Tensor:
        return self.weight[tile].to(self.compute_dtype).to(torch.float32)

    def logits(self, hidden: Tensor, out: Tensor) -> Tensor:
        """Computes ``out[c, v] = sum_d hidden[c, d] weight[v, d]``."""
        if not self.widens:
            return torch.mm(hidden, self.weight.t(), out=out)
        for tile in self._tiles:
            torch.mm(hidden, self._widened(tile).t(), out=out[:, tile])
        return out

    def grad_hidden(self, grad_logits: Tensor, out: Tensor, by: float) -> Tensor:
        """Computes ``out[c, d] = by * sum_v grad_logits[c, v] weight[v, d]``; ``by`` is 1 for widened weights."""
        if not self.widens:
            return self._backend.matmul_(out, grad_logits, self.weight, alpha=by)
        if not self._tiles:  # an empty shard of the vocabulary
            return out.zero_()
        for i, tile in enumerate(self._tiles):
            torch.addmm(out, grad_logits[:, tile], self._widened(tile), beta=float(i > 0), out=out)
        return out

    def add_grad_weight(
        self, grad_logits: Tensor, hidden: Tensor, grad_weight: Tensor, by: float, *, accumulate: bool
    ) -> None:
        """Adds ``by * sum_c grad_logits[c, v] hidden[c, d]`` to ``grad_weight[v, d]``, or overwrites it."""
        beta = 1.0 if accumulate else 0.0  # beta 0 does not read uninitialised memory
        self._backend.matmul_(grad_weight, grad_logits.t(), hidden, beta=beta, alpha=by)

    def add_grad_bias(self, grad_logits: Tensor, grad_bias: Tensor, by: float) -> None:
        """Computes ``grad_bias[v] += by * sum_c grad_logits[c, v]``."""
        self._backend.add_column_sum_(grad_bias, grad_logits, by)
