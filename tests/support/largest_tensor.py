"""Which tensors an operation really allocates, without a GPU: a memory bound as a test."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements that any operation returned, apart from views of some tensors."""

    def __init__(self, *, apart_from: Sequence[Tensor] = ()) -> None:
        super().__init__()
        self.numel, self._known = 0, {x.untyped_storage().data_ptr() for x in apart_from}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        if self._known:
            made = [t for t in made if t.untyped_storage().data_ptr() not in self._known]
        self.numel = max([self.numel, *(t.numel() for t in made)])
        return out
