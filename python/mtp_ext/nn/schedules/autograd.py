"""The reference: all heads forward, all logits, plain torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mtp_ext.nn.schedules.head_stack import HeadStack, head_outputs
from mtp_ext.nn.schedules.targets import Targets
from mtp_ext.ops import reference
from mtp_ext.ops.common.result import MultiTokenLoss


def plain_loss(heads: HeadStack, hidden: Tensor, weight: Tensor, context: Any, targets: Targets) -> MultiTokenLoss:
    """Loss and metrics of all heads; arguments as of ``multi_token_loss``.

    A head that does not run stands as zeros, and its numbers are taken out again.
    """
    outputs = head_outputs(heads, hidden, context, targets.active, targets.detach_heads)
    nothing = hidden.detach().new_zeros(()).expand_as(hidden)
    ran = [outputs.get(k, nothing) for k in range(1, heads.n_heads + 1)]
    keywords: dict[str, Any] = {"softcap": heads.softcap, **targets.of_the_loss()}
    result = reference.multi_token_cross_entropy(ran, weight, targets.labels, **keywords)
    if len(outputs) == heads.n_heads:
        return result
    mask = torch.tensor([k in outputs for k in range(1, heads.n_heads + 1)], device=hidden.device)
    leading = next(k for k in range(heads.n_heads) if k + 1 not in outputs)
    accept = torch.ones_like(result.accept_length)
    if leading:
        keywords["head_weights"] = None
        keywords["detach_weight"] = ()
        with torch.no_grad():
            part = reference.multi_token_cross_entropy(
                ran[:leading], weight[:leading] if weight.dim() == 3 else weight, targets.labels, **keywords
            )
        accept = part.accept_length
    return result._replace(head_loss=result.head_loss * mask, top1=result.top1 * mask, accept_length=accept)
