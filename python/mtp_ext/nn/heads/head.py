"""One prediction head: a layer and a final norm."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from mtp_ext.nn.transformer.checks import is_watched
from mtp_ext.nn.transformer.layers import RMSNorm
from mtp_ext.ops.common.checks import describe
from mtp_ext.ops.rms_norm import rms_norm


class Head(nn.Module):
    """A layer and, unless the heads share one, the final norm before the unembedding.

    Args:
        block: ``[B, S, D] -> [B, S, D]``. Its forward takes the hidden states and, if it has a second positional
            parameter, the context of the trunk's forward; with ``reads_embedding = True``, also the embedding's weight.
            With ``takes_queries = True`` in the class of its forward, that gives ``[B, Q, D]``, at the tokens
            ``context.queries [B, Q]``, where these are not None.
            None is the identity.
        norm: The final norm; None if the heads share one.
        norm_eps: Epsilon of the shared norm.
    """

    def __init__(self, block: nn.Module | None, norm: nn.Module | None, norm_eps: float = 1e-5) -> None:
        super().__init__()
        self.norm_eps = norm_eps
        self.block, self.norm = block, norm
        self.reads_embedding: bool = getattr(block, "reads_embedding", False)
        self.reads_context = block is not None and _takes_two(block)
        self.takes_queries = block is not None and _takes_queries(block)

    def forward(
        self, x: Tensor, context: Any, shared_norm: Tensor | None = None, embedding: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Returns the layer's output and the normed input of the unembedding.

        Args:
            x: ``[B, S, D]``, the trunk's hidden states, or the output of the previous head in a chained variant.
            context: The context of the trunk's forward.
            shared_norm: ``[D]``, the weight of the shared final norm.
            embedding: ``[V, D]``, for a block that reads it.
        Returns:
            Two ``[B, S, D]``.
        """
        state = x
        if self.block is not None:
            arguments = [context] if self.reads_context else []
            state = self.block(x, *arguments, *([embedding] if self.reads_embedding else []))
        if self.norm is not None:
            return state, self.norm(state)
        return state, state if shared_norm is None else rms_norm(state, shared_norm, self.norm_eps)

    def norm_alone(self) -> RMSNorm | None:
        """Returns the norm of a head without a layer; None if hooks or subclasses require calling the modules.

        Parametrized and sharded modules are subclasses.
        """
        norm = self.norm
        if type(self) is not Head or self.block is not None or type(norm) is not RMSNorm:
            return None
        return norm if not is_watched(self) and not is_watched(norm) else None


HeadModules = Sequence[nn.Module] | Callable[[int], nn.Module]


def make_heads(modules: HeadModules, n_future: int | None, width: int, norm_eps: float = 1e-5) -> list[Head]:
    """Wraps a user's modules as heads, each with its own final RMSNorm; a :class:`Head` is used as is.

    Args:
        modules: One module per head, or a function that makes the module of head ``k``, ``1..n``.
        n_future: ``n``; required with a function.
        width: ``D``.
        norm_eps: Epsilon of the norms.
    Raises:
        TypeError, ValueError: Not modules, a wrong number of them, or one object for several heads.
    """
    if isinstance(modules, Sequence):
        made = list(modules)
        if n_future is not None and len(made) != n_future:
            raise ValueError(f"heads must hold n_future={n_future} modules, got {len(made)}")
    elif callable(modules) and not isinstance(modules, nn.Module):
        if n_future is None:
            raise ValueError("n_future must be given where heads is a function")
        made = [modules(k) for k in range(1, n_future + 1)]
    else:
        raise TypeError(f"heads must be a list of modules or a function of k, got {describe(modules)}")
    for k, module in enumerate(made, 1):
        if not isinstance(module, nn.Module):
            raise TypeError(f"heads must be modules, got {describe(module)} for head {k}")
    if len({id(module) for module in made}) < len(made):
        raise ValueError("heads must be n different modules, got one object twice: those heads would share all weights")
    return [m if isinstance(m, Head) else Head(m, RMSNorm(width, norm_eps)) for m in made]


def _takes_queries(module: nn.Module) -> bool:
    """Returns True if the class that a module's forward comes from says that it takes ``context.queries``."""
    owner = next(c for c in type(module).__mro__ if "forward" in vars(c))
    return vars(owner).get("takes_queries", False) and "forward" not in vars(module)


def _takes_two(module: nn.Module) -> bool:
    """Returns True if a module's forward takes a second positional argument, required or named ``context``."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    positional = [p for p in inspect.signature(module.forward).parameters.values() if p.kind in kinds]
    return len(positional) >= 2 and (positional[1].default is positional[1].empty or positional[1].name == "context")
