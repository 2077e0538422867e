"""Heads under FSDP2 (``torch.distributed.fsdp.fully_shard``): what they read is whole while they run.

FSDP2 gathers a module's parameters in the module's forward and reduces their gradients once the backward has left it.
It does not see two things. The unembedding, a shared norm and an embedding that heads read are read without running
their modules. And the sequential schedule takes a head's gradient within the model's forward, where FSDP2's hooks would
take the end of that inner backward for the end of the step's, and reshard every layer.
So what is read is gathered and released here, with the public ``unshard`` and ``reshard``. The gradients reach the
gathered parameters in the step's backward (autograd's accumulation looks at their sizes, not at their data), and FSDP2
reduces them in its callback at the end of it, as it does for any module whose inputs take no gradient.

Private are a state's ``_training_state``, ``_lazy_init`` and ``_register_root_post_backward_final_callback``: there is
no public way to run a module without its hooks, or to ask for the reduction where no module of FSDP2 was called. They
are the same in torch 2.11 to 2.14. Without ``torch.distributed`` nothing here does anything.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from mtp_ext.nn.schedules.head_stack import HeadStack


def sharded_modules(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Those that ``fully_shard`` was called on."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # who shards has imported it, and it takes time to import
    kind = getattr(fsdp, "FSDPModule", None)
    return [] if kind is None else [module for module in modules if isinstance(module, kind)]


@contextmanager
def gathered(modules: Iterable[nn.Module]) -> Iterator[list[nn.Module]]:
    """The parameters of ``modules`` are whole within; yields those that FSDP2 shards."""
    sharded = sharded_modules(modules)
    ours = [module for module in sharded if _gather(module)]
    try:
        yield sharded
    finally:
        _release(ours)


def reduce_in_backward(output: Tensor, modules: Sequence[nn.Module], *, gather: bool) -> None:
    """Makes the backward of ``output`` end with the reduction of the gradients of ``modules``.

    Args:
        output: What the backward starts at or comes through.
        modules: Sharded modules that were read or run without FSDP2's hooks.
        gather: Whether the backward reads their parameters.
    """
    if not modules or not output.requires_grad:
        return

    def before(grad: Tensor) -> None:
        for module in modules:
            # Once in a backward: of the modules under one root, the first one's call counts.
            _state(module)._register_root_post_backward_final_callback()
            if gather:
                _gather(module)  # the reduction releases it

    output.register_hook(before)  # type: ignore[no-untyped-call]


class HeadWeights:
    """The parameters of heads that run one after the other, each head's whole from ``gather`` to ``release``.

    Args:
        heads: The heads.
        running: Which of them run.
    """

    def __init__(self, heads: HeadStack, running: Sequence[int]) -> None:
        self._heads = heads
        self._sharded = {k: sharded_modules(heads.modules_of(k)) for k in running}
        self._parameters = {k: heads.parameters_of(k) for k in running}
        self._seen_whole = {k for k in running if not self._sharded[k]}
        self._ours: dict[int, list[nn.Module]] = {}

    @property
    def modules(self) -> list[nn.Module]:
        """The modules of the heads that FSDP2 shards."""
        return [module for modules in self._sharded.values() for module in modules]

    @property
    def learn(self) -> bool:
        """Whether a parameter of these heads requires a gradient."""
        return any(p.requires_grad for parameters in self._parameters.values() for p in parameters)

    def known(self) -> list[Tensor]:
        """What ``gather`` has given so far, and will give of heads that are not sharded."""
        return [p for k, parameters in self._parameters.items() if k in self._seen_whole for p in parameters]

    def gather(self, k: int) -> list[Tensor]:
        """Head ``k``'s parameters, the same objects every time."""
        if self._sharded[k]:
            found = [module for module in self._sharded[k] if _gather(module)]
            self._ours.setdefault(k, []).extend(found)
            if k not in self._seen_whole:
                self._parameters[k] = self._heads.parameters_of(k)
                self._seen_whole.add(k)
        return self._parameters[k]

    def release(self, k: int) -> None:
        """Frees what ``gather`` gathered; the tensors stay, and have their data back after the next ``gather``."""
        _release(self._ours.pop(k, []))

    def release_all(self) -> None:
        """Releases every head."""
        for k in list(self._ours):
            self.release(k)

    def run(self, k: int, stand_ins: Sequence[Tensor], x: Tensor, context: Any) -> tuple[Tensor, Tensor]:
        """Head ``k``'s ``run_with``; of FSDP2's hooks only the casts of its mixed precision act."""
        if not self._sharded[k]:
            return self._heads.run_with(k, stand_ins, x, context)
        with _hooks_only_cast(self._sharded[k]):
            return self._heads.run_with(k, stand_ins, x, context)


def _gather(module: Any) -> bool:
    """Gathers a sharded module's own parameters; returns whether they were sharded."""
    _state(module)._lazy_init()  # where no root was called before, the module is its own
    before = [id(p) for p in module.parameters()]
    module.unshard()
    return before != [id(p) for p in module.parameters()]


def _release(modules: Iterable[Any]) -> None:
    for module in modules:
        module.reshard()


@contextmanager
def _hooks_only_cast(modules: Sequence[nn.Module]) -> Iterator[None]:
    """As where activation checkpointing runs a module again in the backward: FSDP2's hooks neither gather nor reshard
    then, and leave no nodes in the graph."""
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
