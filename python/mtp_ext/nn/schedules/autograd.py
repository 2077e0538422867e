"""The reference schedule: all heads forward, full logits, plain torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mtp_ext.nn.schedules.head_stack import HeadStack, head_outputs
from mtp_ext.nn.schedules.targets import Targets
from mtp_ext.ops import reference
from mtp_ext.ops.common.checks import check_targets_in_range
from mtp_ext.ops.common.result import MultiTokenLoss
from mtp_ext.ops.loss.row_kernels import prepared, select_rows


def autograd_loss(heads: HeadStack, hidden: Tensor, weight: Tensor, context: Any, targets: Targets) -> MultiTokenLoss:
    """Computes loss and metrics of all heads; arguments as in ``multi_token_loss``.

    Heads that do not run are replaced by zeros and masked out of the results.
    """
    call = targets.of_hidden(hidden)
    invalid = select_rows(prepared(call), heads.vocab_size).first_invalid
    check_targets_in_range(call.labels, invalid, heads.vocab_size, call.ignore_index)
    outputs = head_outputs(heads, hidden, context, targets.active, targets.detach_heads)
    nothing = hidden.detach().new_zeros(()).expand_as(hidden)
    ran = [outputs.get(k, nothing) for k in range(1, heads.n_heads + 1)]
    result = reference.loss_of(call, ran, weight)
    if len(outputs) == heads.n_heads:
        return result
    mask = torch.tensor([k in outputs for k in range(1, heads.n_heads + 1)], device=hidden.device)
    leading = next(k for k in range(heads.n_heads) if k + 1 not in outputs)
    accept = torch.ones_like(result.accept_length)
    if leading:
        with torch.no_grad():
            part = call.of_heads(range(leading))
            unembeddings = weight[:leading] if weight.dim() == 3 else weight
            accept = reference.loss_of(part, ran[:leading], unembeddings).accept_length
    return result._replace(head_loss=result.head_loss * mask, top1=result.top1 * mask, accept_length=accept)
