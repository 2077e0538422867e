"""Gathers the parameters that heads read under FSDP2 (``torch.distributed.fsdp.fully_shard``).

FSDP2 gathers a module's parameters in its forward and reduces their gradients after its backward. It misses two cases.
The unembedding, a shared norm and an embedding that heads read are used without running their modules. And the
sequential schedule computes a head's gradient within the model's forward, where FSDP2's hooks would mistake the end of
that inner backward for the end of the step's and reshard every layer.
These parameters are therefore gathered and released here, with the public ``unshard`` and ``reshard``. Their gradients
are accumulated in the step's backward (autograd checks sizes, not data), and FSDP2 reduces them in its callback at the
end of it, as for any module whose inputs need no gradient.

A state's ``_training_state``, ``_lazy_init`` and ``_register_root_post_backward_final_callback`` are private: there is
no public way to run a module without its hooks, or to request the reduction if no FSDP2 module was called. They are the
same in torch 2.11 to 2.14. Without ``torch.distributed`` everything here is a no-op.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from mtp_ext.nn.schedules.head_stack import HeadStack


def sharded_modules(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Returns the modules that ``fully_shard`` was called on."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # slow to import, and already imported if anything is sharded
    kind = getattr(fsdp, "FSDPModule", None)
    return [] if kind is None else [module for module in modules if isinstance(module, kind)]


@contextmanager
def gathered(modules: Iterable[nn.Module]) -> Iterator[list[nn.Module]]:
    """Gathers the parameters of ``modules`` within the context; yields the modules that FSDP2 shards."""
    sharded = sharded_modules(modules)
    ours = [module for module in sharded if _gather(module)]
    try:
        yield sharded
    finally:
        _release(ours)


def reduce_in_backward(output: Tensor, modules: Sequence[nn.Module], *, gather: bool) -> None:
    """Makes the backward of ``output`` end with the gradient reduction of ``modules``.

    Args:
        output: A tensor that the backward passes through.
        modules: Sharded modules that were read or run without FSDP2's hooks.
        gather: Whether backward reads their parameters.
    """
    if not modules or not output.requires_grad:
        return

    def before(grad: Tensor) -> None:
        for module in modules:
            # Once per backward: only the first call among the modules of one root has an effect.
            _state(module)._register_root_post_backward_final_callback()
            if gather:
                _gather(module)  # the reduction releases it

    output.register_hook(before)  # type: ignore[no-untyped-call]


class HeadWeights:
    """The parameters of heads that run one by one; a head's are whole from ``gather`` to ``release``.

    Args:
        heads: The heads.
        running: The heads that run.
    """

    def __init__(self, heads: HeadStack, running: Sequence[int]) -> None:
        self._heads = heads
        self._sharded = {k: sharded_modules(heads.modules_of(k)) for k in running}
        self._parameters = {k: heads.parameters_of(k) for k in running}
        self._seen_whole = {k for k in running if not self._sharded[k]}
        self._ours: dict[int, list[nn.Module]] = {}

    @property
    def modules(self) -> list[nn.Module]:
        """The heads' modules that FSDP2 shards."""
        return [module for modules in self._sharded.values() for module in modules]

    @property
    def learn(self) -> bool:
        """True if any parameter of these heads requires a gradient."""
        return any(p.requires_grad for parameters in self._parameters.values() for p in parameters)

    def known(self) -> list[Tensor]:
        """Returns the parameters gathered so far, and those of heads that are not sharded."""
        return [p for k, parameters in self._parameters.items() if k in self._seen_whole for p in parameters]

    def gather(self, k: int) -> list[Tensor]:
        """Gathers and returns head ``k``'s parameters, the same objects every time."""
        if self._sharded[k]:
            found = [module for module in self._sharded[k] if _gather(module)]
            self._ours.setdefault(k, []).extend(found)
            if k not in self._seen_whole:
                self._parameters[k] = self._heads.parameters_of(k)
                self._seen_whole.add(k)
        return self._parameters[k]

    def release(self, k: int) -> None:
        """Frees the data of head ``k``'s parameters until the next ``gather``; the tensor objects stay."""
        _release(self._ours.pop(k, []))

    def release_all(self) -> None:
        """Releases every head."""
        for k in list(self._ours):
            self.release(k)

    def run(self, k: int, stand_ins: Sequence[Tensor], x: Tensor, context: Any) -> tuple[Tensor, Tensor]:
        """Calls ``run_with`` of head ``k``; of FSDP2's hooks, only the mixed-precision casts run."""
        if not self._sharded[k]:
            return self._heads.run_with(k, stand_ins, x, context)
        with _hooks_only_cast(self._sharded[k]):
            return self._heads.run_with(k, stand_ins, x, context)


def _gather(module: Any) -> bool:
    """Gathers a sharded module's own parameters; returns True if they were sharded."""
    _state(module)._lazy_init()  # the module becomes its own root if no root has run yet
    before = [id(p) for p in module.parameters()]
    module.unshard()
    return before != [id(p) for p in module.parameters()]


def _release(modules: Iterable[Any]) -> None:
    for module in modules:
        module.reshard()


@contextmanager
def _hooks_only_cast(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Sets the state in which FSDP2's hooks neither gather nor reshard, and add no graph nodes.

    It is that of a module that activation checkpointing reruns in backward.
    """
    from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState

    states = [_state(module) for module in modules]
    before = [state._training_state for state in states]
    for state in states:
        state._training_state = TrainingState.PRE_BACKWARD
    try:
        yield
    finally:
        for state, training_state in zip(states, before, strict=True):
            state._training_state = training_state


def _state(module: Any) -> Any:
    return module._get_fsdp_state()
