"""A-priori bounds of the rounding errors of a loss with 16-bit operands; docs/internals/numerics.md derives them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mtp_ext.ops.loss.options import RowOptions

# Hoeffding: a sum of independent errors |e_j| <= c_j exceeds CONFIDENCE * sqrt(sum c_j^2) with probability below
# 2 exp(-CONFIDENCE^2 / 2) = 1e-12.
CONFIDENCE = 7.5
FLOAT32_UNIT = 2.0**-24
FLOAT16_TINY = 2.0**-25  # half the spacing of float16 below its normal numbers


def unit(dtype: torch.dtype) -> float:
    """The largest relative error of one rounding to ``dtype``."""
    return torch.finfo(dtype).eps / 2


@dataclass(frozen=True)
class ErrorSum:
    """What bounds the sum of many rounding errors, elementwise."""

    absolute: Tensor | float  # sum of |e_j|
    squares: Tensor | float  # sum of e_j^2
    certain: Tensor | float = 0.0  # errors that no averaging makes smaller

    def __add__(self, other: ErrorSum) -> ErrorSum:
        return ErrorSum(self.absolute + other.absolute, self.squares + other.squares, self.certain + other.certain)

    def bound(self) -> Tensor:
        """The sum's largest absolute value: certain for few errors, with probability 1 - 1e-12 for many."""
        absolute, squares = torch.as_tensor(self.absolute), torch.as_tensor(self.squares)
        return torch.minimum(absolute, CONFIDENCE * squares.clamp_min(0).sqrt()) + self.certain


class HeadErrors:
    """Error bounds of one head's rows, to first order in the unit roundoff of the logits.

    Args:
        hidden: ``[N, D]`` float64, of the rows that count; what the fused loss gets, exactly.
        weight: ``[V, D]`` float64.
        bias: ``[V]`` float64, or None.
        targets: ``[N]`` int64.
        loss_grad: ``[N]``, what a row's loss weighs in what is differentiated.
        lse_grad: ``[N]``, what its log-sum-exp weighs.
        options: The row options.
        logits_dtype: What the logits, and then their gradient, are held in.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        loss_grad: Tensor,
        lse_grad: Tensor,
        options: RowOptions,
        logits_dtype: torch.dtype,
    ) -> None:
        self._hidden, self._weight, self._loss_grad = hidden, weight, loss_grad
        scale, cap = options.logit_scale, options.softcap or math.inf
        raw = hidden @ weight.t()
        products = hidden.abs() @ weight.abs().t()
        shift = unit(logits_dtype) * raw.abs() * (logits_dtype.itemsize == 2)
        shift = shift + hidden.shape[-1] * FLOAT32_UNIT * products
        inner = scale * (raw if bias is None else raw + bias)

        def capped(x: Tensor) -> Tensor:
            return x if cap == math.inf else cap * torch.tanh(x / cap)

        logits = capped(inner)
        # The error of each logit, and 8 float32 roundings of what the row kernel does with it.
        reach = abs(scale) * shift
        self._e = torch.maximum(capped(inner + reach) - logits, logits - capped(inner - reach))
        self._e = self._e + 8 * FLOAT32_UNIT * (1 + logits.abs())
        lse = logits.logsumexp(1, keepdim=True)
        p = torch.exp(logits - lse)
        self._lse_error = (p * self._e.exp()).sum(1, keepdim=True).log()
        self._growth = (self._e.amax(1, keepdim=True) + self._lse_error).exp()

        # loss = sum_v t_v (lse - l_v) + z lse^2, and t what smoothing and class weights make of the target.
        vocab = weight.shape[0]
        class_weights = torch.ones(vocab, dtype=torch.float64)
        if options.class_weights is not None:
            class_weights = options.class_weights.double()
        t = (options.label_smoothing / vocab * class_weights).expand_as(p).clone()
        t[torch.arange(len(t)), targets] += (1 - options.label_smoothing) * class_weights[targets]
        self._loss_slope = (t.sum(1, keepdim=True) + 2 * options.z_loss * lse) * p - t
        self._p = p

        weighted, z = loss_grad[:, None], 2 * options.z_loss * loss_grad[:, None]
        attract = weighted * t.sum(1, keepdim=True) + z * lse + lse_grad[:, None]  # dL/dlse
        slope = scale * (1 - (logits / cap) ** 2)
        curve = -2 * scale * logits / cap**2
        grad = attract * p - weighted * t
        self._grad_logits = slope * grad
        # dz_v = slope_v grad_v moves by own_v delta_v - shared_v sum_w p_w delta_w where logit w moves by delta_w.
        self._own = slope * attract * p + curve * grad
        self._shared = slope * p * (attract - z)
        self._slope_p = slope * p
        self._coupling = attract - z
        stored = self._grad_logits.abs() * (unit(logits_dtype) if logits_dtype.itemsize == 2 else 4 * FLOAT32_UNIT)
        if logits_dtype == torch.float16:
            stored = stored.clamp_min(FLOAT16_TINY)
        self._stored = stored
        self._roughness = unit(logits_dtype) if logits_dtype.itemsize == 2 else 0.0

    def losses(self, row_weights: Tensor) -> ErrorSum:
        """Of ``sum_i row_weights[i] loss[i]``; ``row_weights [N]``."""
        each = row_weights[:, None] * self._loss_slope * self._e * self._growth
        return ErrorSum(each.abs().sum(), (each**2).sum())

    def each_loss(self, row_weights: Tensor) -> Tensor:
        """``[N]``: of ``row_weights[i] loss[i]``."""
        each = row_weights[:, None] * self._loss_slope * self._e * self._growth
        return ErrorSum(each.abs().sum(1), (each**2).sum(1)).bound()

    def each_lse(self) -> Tensor:
        """``[N]``: of each row's log-sum-exp."""
        each = self._p * self._e * self._growth
        return ErrorSum(each.abs().sum(1), (each**2).sum(1)).bound()

    def grad_hidden(self) -> Tensor:
        """``[N, D]``."""
        w, e = self._weight, self._e * self._growth
        own, shared = self._own * e, self._coupling * self._p * e
        pull = self._slope_p @ w  # [N, D]: dz moves by it where every p does
        absolute = own.abs() @ w.abs() + shared.abs().sum(1, keepdim=True) * pull.abs()
        squares = own**2 @ w**2 - 2 * pull * ((own * shared) @ w) + pull**2 * (shared**2).sum(1, keepdim=True)
        stored = ErrorSum(self._stored @ w.abs(), self._stored**2 @ w**2)
        return (ErrorSum(absolute, squares) + stored).bound()

    def _of_grad_logits(self) -> ErrorSum:
        """Of each element of the logits' gradient, ``[N, V]``."""
        p_e = self._p * self._e * self._growth
        e = self._e * self._growth
        own = (self._own - self._shared * self._p) * e
        others = (p_e**2).sum(1, keepdim=True) - p_e**2
        return ErrorSum(
            own.abs() + self._shared.abs() * (p_e.sum(1, keepdim=True) - p_e) + self._stored,
            own**2 + self._shared**2 * others + self._stored**2,
        )

    def grad_weight(self) -> ErrorSum:
        """``[V, D]``."""
        h, of_logits = self._hidden, self._of_grad_logits()
        # A device without a float32 result of 16-bit GEMMs rounds the product of each chunk.
        chunks = self._roughness * (self._grad_logits.abs().t() @ h.abs())
        return ErrorSum(of_logits.absolute.t() @ h.abs(), of_logits.squares.t() @ h**2, chunks)

    def grad_bias(self) -> ErrorSum:
        """``[V]``."""
        of_logits = self._of_grad_logits()
        return ErrorSum(of_logits.absolute.sum(0), of_logits.squares.sum(0))


def total(sums: Sequence[ErrorSum], zero: Tensor) -> Tensor:
    """The bound of the sum of ``sums``; ``zero`` where there are none."""
    return sum(sums, ErrorSum(zero, zero)).bound()
