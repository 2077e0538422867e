"""Muon: momentum with orthogonalised updates (K. Jordan et al. 2024, github.com/KellerJordan/Muon).

`torch.optim.Muon` always iterates in bfloat16, which takes about 25 times as long as float32 on a CPU without native
bfloat16 (docs/guide/train.md). This implementation iterates in float32 on the CPU, and batches matrices of equal shape.
Sharded matrices are gathered, and orthogonalised in every process.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from mtp_ext.distributed.whole_state import shard_like, whole

# The quintic of the reference implementation, steepest at zero: five iterations bring every singular value near 1 (into
# about [0.7, 1.2]).
QUINTIC = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5


def orthogonalize(matrices: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Approximates the nearest (semi-)orthogonal matrices by Newton-Schulz iteration.

    Args:
        matrices: ``[M, rows, cols]``.
        dtype: Dtype of the iteration.
    Returns:
        ``[M, rows, cols]`` in ``matrices``' dtype; singular values near 1.
    """
    tall = matrices.shape[1] > matrices.shape[2]
    x = (matrices.mT if tall else matrices).to(dtype)
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)  # spectral norm <= Frobenius norm = 1
    a, b, c = QUINTIC
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """Muon for two-dimensional hidden weights; use AdamW for embeddings, unembeddings and norms.

    The update is ``p -= lr * weight_decay * p + lr * sqrt(max(1, rows / cols)) * orthogonalize(nesterov momentum)``.

    Args:
        params: Matrices, or parameter groups of them.
        lr: Learning rate: the spectral norm of an update of a square matrix.
        momentum: Decay of the momentum.
        weight_decay: Decoupled weight decay.
    Raises:
        ValueError: A parameter is not a matrix.
    """

    def __init__(
        self, params: Iterable[Any], lr: float = 0.02, momentum: float = 0.95, weight_decay: float = 0.1
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        for group in self.param_groups:
            for p in group["params"]:
                if p.ndim != 2:
                    raise ValueError(f"params: Muon takes matrices, got a parameter of shape {tuple(p.shape)}")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Updates every parameter that has a gradient."""
        loss = None if closure is None else closure()
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    by_shape[p.shape].append(p)
            for params in by_shape.values():
                self._update(params, group)
        return loss

    def _update(self, params: list[Tensor], group: dict[str, Any]) -> None:
        """Updates parameters of equal shape in one batch."""
        grads = [p.grad for p in params if p.grad is not None]
        for p in params:
            if "momentum" not in self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
        momenta = [self.state[p]["momentum"] for p in params]
        torch._foreach_lerp_(momenta, grads, 1.0 - group["momentum"])
        ahead = torch._foreach_lerp(grads, momenta, group["momentum"])  # Nesterov: the momentum after one more step
        rows, cols = params[0].shape
        dtype = torch.bfloat16 if params[0].is_cuda else params[0].dtype
        updates = orthogonalize(torch.stack([whole(matrix) for matrix in ahead]), dtype)
        placed = [shard_like(update, p) for update, p in zip(updates.unbind(), params, strict=True)]
        torch._foreach_mul_(params, 1.0 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(params, placed, alpha=-group["lr"] * math.sqrt(max(1.0, rows / cols)))
