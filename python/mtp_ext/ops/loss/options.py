"""The options that all losses share: how a row of logits becomes a loss."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mtp_ext.ops.common import checks


@dataclass(frozen=True)
class RowOptions:
    """How a row of logits becomes a loss; the defaults are plain cross-entropy. Formulas: ``csrc/core/row_loss.h``.

    Args:
        label_smoothing: In [0, 1], as in :func:`torch.nn.functional.cross_entropy`.
        z_loss: Adds ``z_loss * lse**2`` per token (PaLM, arXiv 2204.02311, section 5).
        softcap: ``logits <- softcap * tanh(logits / softcap)`` (Gemma 2, arXiv 2408.00118).
        logit_scale: Multiplies the logits, before the cap.
        class_weights: ``[V]`` floats, used in the loss's dtype, as in :func:`torch.nn.functional.cross_entropy`.
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float | None = None
    logit_scale: float = 1.0
    class_weights: Tensor | None = None

    def check(self, vocab_size: int, device: torch.device) -> None:
        """Raises TypeError or ValueError for the first wrong option.

        Args:
            vocab_size: ``V``, of this process.
            device: The device of the logits.
        """
        for name in ("label_smoothing", "z_loss", "logit_scale"):
            checks.check_number(name, getattr(self, name))
        if self.softcap is not None:
            checks.check_number("softcap", self.softcap, " or None")
        if not 0.0 <= self.label_smoothing <= 1.0:
            raise ValueError(f"label_smoothing must be in [0, 1], got {self.label_smoothing}")
        if not 0.0 <= self.z_loss < math.inf:
            raise ValueError(f"z_loss must be finite and not negative, got {self.z_loss}")
        if self.softcap is not None and not 0.0 < self.softcap < math.inf:
            raise ValueError(f"softcap must be positive and finite, or None, got {self.softcap}")
        if not abs(self.logit_scale) < math.inf:
            raise ValueError(f"logit_scale must be finite, got {self.logit_scale}")
        checks.check_vector("class_weights", self.class_weights, vocab_size, "V", checks.FLOAT_DTYPES, device)

    def pack(self) -> list[float]:
        """Returns the scalars in the order of ``RowOptions::of`` in ``csrc/core/row_loss.h``."""
        scalars = (self.label_smoothing, self.z_loss, self.softcap or 0.0, self.logit_scale)
        return [checks.python_number(x) for x in scalars]

    @staticmethod
    def unpack(packed: list[float], class_weights: Tensor | None) -> RowOptions:
        """Inverts :meth:`pack`."""
        label_smoothing, z_loss, softcap, logit_scale = packed
        return RowOptions(
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            softcap=softcap or None,
            logit_scale=logit_scale,
            class_weights=class_weights,
        )
