"""The bytes alive in a run on fake tensors, by what they hold.

`torch.distributed._tools.mem_tracker` has no category for logits, counts the gradients that a schedule takes in the
forward as activations, and does not see what the native loss allocates; hence a tracker of its own.
"""

from __future__ import annotations

import itertools
import weakref
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mtp_ext import _C
from mtp_ext.ops.loss import native_cpu

CUDA_BLOCK = 512  # what torch's caching allocator rounds up to (kMinBlockSize)


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records every allocation and release of the operators that run in it.

    A storage that is never marked is a temporary (``"workspace"``). Logits are what is computed from the unembedding or
    from other logits and has the vocabulary as its last dimension; where ``D = V``, so have hidden states' gradients.

    Args:
        vocab_size: ``V``.
    """

    def __init__(self, vocab_size: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._vocab_size = vocab_size
        self._alive: dict[int, tuple[int, weakref.ref[Any]]] = {}  # by address of the storage: its number
        self._numbers = itertools.count()
        self._events: list[tuple[int, int]] = []  # number of the storage, bytes; negative when released
        self._kinds: dict[int, str] = {}
        self._scoring: set[int] = set()  # the unembedding, its copies, and logits
        self._kept: tuple[int, int] | None = None  # the native loss's block of logits: number, bytes

    def mark(self, kind: str, tensors: Iterable[Any]) -> None:
        """Says what the storages of ``tensors`` hold, unless they are marked already; other objects are ignored."""
        for x in tensors:
            if isinstance(x, Tensor):
                self._kinds.setdefault(self._number(x), kind)

    def mark_unembedding(self, weights: Iterable[Tensor]) -> None:
        """Says which weights turn hidden states into logits."""
        self._scoring.update(map(self._number, weights))

    def saving(self) -> torch.autograd.graph.saved_tensors_hooks:
        """Returns a context in which tensors that autograd saves for backward are marked ``"activations"``."""

        def pack(x: Tensor) -> Tensor:
            self.mark("activations", [x])
            return x.detach()  # x itself would keep its own graph alive

        return torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x)

    def at_peak(self) -> Counter[str]:
        """Returns the bytes alive when most are alive, by kind."""
        totals = list(itertools.accumulate(size for _, size in self._events))
        last = max(range(len(totals)), key=totals.__getitem__)
        found: Counter[str] = Counter()
        for number, size in self._events[: last + 1]:
            found[self._kinds.get(number, "workspace")] += size
        return found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.mtp_ext._fused_loss_.default:
            hidden, weight, _, _, sizes, compute_dtype, flags, _ = args
            self._native_scratch(*native_cpu.scratch_bytes(hidden, weight, sizes, compute_dtype, flags))
        result = func(*args, **kwargs)
        outputs = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        scores = any(self._number(x) in self._scoring for x in inputs)
        for x in outputs:
            number = self._number(x)
            if scores and x.dim() > 1 and self._vocab_size in x.shape[-2:]:
                self._scoring.add(number)
                if x.shape[-1] == self._vocab_size:
                    self._kinds.setdefault(number, "logits")
        return result

    def _number(self, x: Tensor) -> int:
        """Returns the number of a tensor's storage, which is recorded when it is first seen."""
        storage = x.untyped_storage()
        address = storage._cdata
        known = self._alive.get(address)
        if known is not None:
            return known[0]
        size = storage.nbytes()
        if x.device.type == "cuda":
            size = -(-size // CUDA_BLOCK) * CUDA_BLOCK
        number = self._add(size)

        def release(_: object) -> None:
            del self._alive[address]
            self._events.append((number, -size))

        self._alive[address] = (number, weakref.ref(storage, release))
        return number

    def _add(self, size: int, kind: str | None = None) -> int:
        number = next(self._numbers)
        self._events.append((number, size))
        if kind is not None:
            self._kinds[number] = kind
        return number

    def _native_scratch(self, logits: int, operands: int) -> None:
        """Records what the native loss allocates below the dispatcher."""
        if self._kept is None or self._kept[1] < logits:
            if self._kept is not None:
                self._events.append((self._kept[0], -self._kept[1]))
            self._kept = (self._add(logits, "logits"), logits)
        self._events.append((self._add(operands), -operands))
        if self._kept[1] > _C.KEPT_BYTES:
            self._events.append((self._kept[0], -self._kept[1]))
            self._kept = None
