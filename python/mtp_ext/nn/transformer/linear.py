"""The matrices of transformer layers and heads."""

from __future__ import annotations

from torch import Tensor, nn

from mtp_ext.ops.few_rows import linear


class Linear(nn.Linear):
    """:class:`torch.nn.Linear` without a bias, through :func:`mtp_ext.ops.few_rows.linear`."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``[..., I] -> [..., O]``."""
        return linear(x, self.weight)
