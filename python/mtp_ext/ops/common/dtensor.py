"""Whether a tensor is a DTensor, without importing them: that takes 0.6 s, and torch may be built without them."""

from __future__ import annotations

import sys


def is_dtensor(x: object) -> bool:
    """Whether ``x`` is a :class:`torch.distributed.tensor.DTensor`; who has one has imported its module."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)
