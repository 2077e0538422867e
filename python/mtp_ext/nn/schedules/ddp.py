"""Gradients of zeros for DDP, which waits in every backward for one of every parameter."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from mtp_ext.nn.schedules.head_stack import HeadStack
from mtp_ext.nn.schedules.targets import Targets
from mtp_ext.ops.common.result import MultiTokenLoss


def reach_all(
    result: MultiTokenLoss, heads: HeadStack, hidden: Tensor, weight: Tensor, targets: Targets
) -> MultiTokenLoss:
    """Returns ``result`` with a loss that depends, within DDP, on everything that requires grad.

    The parameters of heads of weight 0 get a gradient of zeros, and so does what every head detaches: the trunk and the
    unembedding. Outside DDP they get none.
    """
    # Private, but torch's own compiler asks it too.
    if not torch.is_grad_enabled() or DistributedDataParallel._get_active_ddp_module() is None:  # type: ignore[no-untyped-call]
        return result
    idle = [p for k in range(1, heads.n_heads + 1) if k not in targets.active for p in heads.parameters_of(k)]
    if targets.detach_heads or not targets.active:
        idle.append(hidden)
    if targets.call.detach_weight or not targets.active:
        idle += [x for x in (weight, targets.call.bias) if x is not None]
    # Sums of nothing: a product with 0 would be NaN for a parameter that is not finite.
    nothing = [x.flatten()[:0].sum().to(result.loss.dtype) for x in idle if x.requires_grad]
    return result._replace(loss=sum(nothing, start=result.loss))
