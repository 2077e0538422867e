"""Fast path to the native loss for one head without options.

The general path builds a :class:`LossCall` in Python, whose code is cold in the cache after a step's GEMMs: 0.15 ms per
call (one thread), a tenth of forward and backward at N = D = V = 256. Both paths end in the same native code and the
same autograd Function.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mtp_ext.ops.common import backend
from mtp_ext.ops.common.checks import INDEX_DTYPES, check_first_invalid
from mtp_ext.ops.common.transforms import is_transformed, is_written_down
from mtp_ext.ops.loss.autograd import PrecomputedGradients
from mtp_ext.ops.loss.native_cpu import FLAG_HIDDEN, FLAG_WEIGHT
from mtp_ext.ops.loss.options import RowOptions

_PLAIN_TYPES = (Tensor, torch.nn.Parameter)
_MEAN, _SUM = [*RowOptions().pack(), 0.0], [*RowOptions().pack(), 1.0]  # as in LossCall.pack()


def takes(hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, reduction: str) -> bool:
    """Returns True if the fast path supports the arguments; the general path reports errors."""
    return (
        type(hidden) in _PLAIN_TYPES
        and type(weight) in _PLAIN_TYPES
        and type(targets) is Tensor
        and not torch.compiler.is_compiling()
        and hidden.is_cpu
        and weight.is_cpu
        and targets.is_cpu
        and hidden.dtype == weight.dtype
        and hidden.dtype in (torch.float32, torch.float64)
        and targets.dtype in INDEX_DTYPES
        and hidden.dim() > 0
        and weight.dim() == 2
        and weight.shape[0] > 0
        and weight.shape[1] == hidden.shape[-1]
        and targets.shape == hidden.shape[:-1]
        and type(ignore_index) is int
        and -(2**63) <= ignore_index < 2**63
        and hidden.layout == weight.layout == targets.layout == torch.strided
        and reduction in ("mean", "sum")
        and not torch.is_autocast_enabled("cpu")
        and backend.forced is None
        and not is_transformed()
        and not is_written_down()
    )


def plain_loss(hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, reduction: str) -> Tensor:
    """Computes the loss, 0-d, of arguments for which :func:`takes` is True."""
    with_grad = torch.is_grad_enabled()
    need_hidden, need_weight = with_grad and hidden.requires_grad, with_grad and weight.requires_grad
    with torch._C._AutoDispatchBelowAutograd():  # like torch.no_grad(), but 2 us cheaper
        results, first_invalid = torch.ops.mtp_ext._fused_loss_.default(
            [hidden],
            weight,
            [targets],
            _MEAN if reduction == "mean" else _SUM,
            [-1, 1, 0, ignore_index, 0, 0, 0],
            weight.dtype,
            FLAG_HIDDEN * need_hidden + FLAG_WEIGHT * need_weight,
            [],
        )
    if first_invalid >= 0:
        check_first_invalid(first_invalid, targets.reshape(1, -1), weight.shape[0], ignore_index)
    loss, *grads = results
    if not grads:
        return loss  # type: ignore[no-any-return]
    gradients = (grads[0] if need_weight else None, grads[-1] if need_hidden else None)
    return PrecomputedGradients.apply((loss,), gradients, None, weight, hidden)[0]  # type: ignore[no-any-return,no-untyped-call]
