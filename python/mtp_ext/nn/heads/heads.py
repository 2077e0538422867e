"""The prediction heads: head ``k`` in ``1..n`` predicts token ``t + k`` from the trunk's output."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mtp_ext.nn.heads.head import Head
from mtp_ext.nn.heads.unembedding import ReplicatedUnembedding, check_linear_map
from mtp_ext.nn.schedules.dispatch import check_schedule, multi_token_loss
from mtp_ext.nn.schedules.fsdp import gathered, reduce_in_backward
from mtp_ext.nn.schedules.targets import StepKeywords, Targets
from mtp_ext.nn.transformer.layers import RMSNorm
from mtp_ext.nn.variants import VARIANTS, chains_of, check_variant
from mtp_ext.ops.common.checks import describe
from mtp_ext.ops.common.result import MultiTokenLoss
from mtp_ext.ops.common.runtime import is_dtensor
from mtp_ext.ops.few_rows import linear
from mtp_ext.ops.rms_norm import rms_norm_heads
from mtp_ext.ops.rms_norm import uses_kernel as rms_norm_uses_kernel
from mtp_ext.ops.top_classes import largest_logits

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Heads(nn.Module):
    """``n`` heads and the order in which they run. Parameters: ``0.*`` (head 1) to ``{n-1}.*``, and ``norm`` if shared.

    ``chains`` is that order: the first head of a chain reads the trunk, each later one the layer output of the previous
    head. In the parallel variant every head is its own chain. With ``recompute = True`` chained heads keep only their
    inputs between forward and backward, and run again: ``B S D`` per head instead of a layer's activations.

    Args:
        heads: The heads, 1 to ``n``.
        unembed: A module with the unembedding ``weight``, ``[V, D]`` or ``[n, V, D]``; owned by another module.
        variant: Determines the order of the heads.
        width: ``D``.
        norm: The shared final norm.
        softcap: Soft cap of the logits.
        embed: The embedding, for heads that read it and for a replicated unembedding tied to it.
        tied: Whether a replicated unembedding lacks head 1's matrix, which is then the embedding.
    Raises:
        ValueError: No heads, or an unknown variant.
    """

    def __init__(
        self,
        heads: Sequence[Head],
        unembed: nn.Module,
        *,
        variant: str,
        width: int,
        norm: RMSNorm | None = None,
        softcap: float | None = None,
        embed: nn.Embedding | None = None,
        tied: bool = False,
    ) -> None:
        super().__init__()
        check_variant(variant)
        if not heads:
            raise ValueError("heads must hold at least one head, got none")
        self.n_heads, self.width, self.softcap = len(heads), width, softcap
        self.chains = chains_of(variant, self.n_heads)
        self.one_row = VARIANTS[variant].one_norm and all(head.block is head.norm is None for head in heads)
        self.recompute = False
        # In a tuple, so that they are not registered twice.
        self._borrowed = (unembed, embed)
        self.reads_tokens = any(head.reads_embedding for head in heads)
        self._tied, self._reads_embed = tied, tied or self.reads_tokens
        for k, head in enumerate(heads):
            self.add_module(str(k), head)
        self.norm = norm

    def head(self, k: int) -> Head:
        """Returns head ``k``, 1-based."""
        head = self.get_submodule(str(k - 1))
        assert isinstance(head, Head)
        return head

    @property
    def vocab_size(self) -> int:
        """``V``."""
        weight = self._borrowed[0].weight
        assert isinstance(weight, Tensor)
        return weight.shape[-2]

    @property
    def shares_unembedding(self) -> bool:
        """True if all heads have one unembedding."""
        weight = self._borrowed[0].weight
        assert isinstance(weight, Tensor)
        return weight.dim() == 2

    @property
    def unembedding(self) -> Tensor:
        """The unembedding, ``[V, D]`` shared by all heads, or ``[n, V, D]``."""
        unembed, embed = self._borrowed
        if isinstance(unembed, ReplicatedUnembedding):
            return unembed.all_with(embed.weight if self._tied and embed is not None else None)
        weight = unembed.weight
        assert isinstance(weight, Tensor)
        return weight

    def _whole_unembedding(self) -> tuple[Tensor, Tensor | None]:
        """The unembedding, ``[V, D]`` or ``[n, V, D]``, and its bias ``[V]``.

        Raises:
            TypeError: It is not a linear map, or not in this process as a whole.
        """
        unembed = self._borrowed[0]
        check_linear_map(unembed)
        weight, bias = self.unembedding, getattr(unembed, "bias", None)
        if is_dtensor(weight):
            raise TypeError(
                "unembed.weight must be a local tensor [V, D] or [n, V, D], got a DTensor. Under FSDP2, call the "
                "module that was sharded last, model(...), or name the method that you call: "
                "register_fsdp_forward_method(model, 'all_logits')"
            )
        return weight, bias

    def logits(self, k: int, normed: Tensor) -> Tensor:
        """Returns head ``k``'s logits ``[..., V]`` from its normed output ``[..., D]``."""
        with gathered(self._read_alone()) as sharded:
            weight, bias = self._whole_unembedding()
            logits = linear(normed, weight if weight.dim() == 2 else weight[k - 1], bias)
        reduce_in_backward(logits, sharded, gather=True)
        return self._capped(logits)

    def best_classes(self, k: int, normed: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Returns head ``k``'s ``count`` largest logits from its normed output ``[R, D]``, and their ids.

        Two ``[R, count]``, in descending order; ties go to the lowest id. No gradients. See
        :func:`mtp_ext.ops.top_classes.largest_logits`.
        """
        with torch.no_grad(), gathered(self._read_alone()):
            weight, bias = self._whole_unembedding()
            logits, classes = largest_logits(normed, weight if weight.dim() == 2 else weight[k - 1], count, bias)
        return self._capped(logits), classes  # the cap is monotonic and keeps the order

    def _capped(self, logits: Tensor) -> Tensor:
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def run(self, k: int, x: Tensor, context: Any) -> tuple[Tensor, Tensor]:
        """Runs head ``k`` under autograd; returns its layer output and its normed output, two ``[B, S, D]``."""
        with gathered(self._read_alone()) as sharded:
            state, normed = self.head(k)(x, context, **self._common(k))
        for output in (state, normed):
            reduce_in_backward(output, sharded, gather=True)
        return state, normed

    def modules_of(self, k: int) -> list[nn.Module]:
        """Returns head ``k`` and its submodules."""
        return list(self.head(k).modules())

    def norm_together(self, wanted: Collection[int], x: Tensor) -> dict[int, Tensor] | None:
        """Returns the normed outputs ``[B, S, D]`` of heads that consist of a norm only, reading ``x`` once.

        None if the heads must run one by one: they have layers, hooks or subclasses, or the kernel does not support
        ``x``.
        """
        found = [self.head(k).norm_alone() for k in sorted(wanted)]
        norms = [norm for norm in found if norm is not None]
        if len(norms) < max(2, len(found)) or len({(norm.eps, norm.weight.dtype) for norm in norms}) > 1:
            return None
        if not all(rms_norm_uses_kernel(x, norm.weight) for norm in norms):
            return None
        assert norms[0].eps is not None
        outputs = rms_norm_heads(x, torch.stack([norm.weight for norm in norms]), norms[0].eps)
        return dict(zip(sorted(wanted), outputs.unbind(0), strict=True))

    def parameters_of(self, k: int) -> list[Tensor]:
        """Returns the parameters that head ``k`` reads, in a fixed order; heads may share some."""
        return [*self.head(k).parameters(), *self._common(k).values()]

    def run_with(self, k: int, parameters: Sequence[Tensor], x: Tensor, context: Any) -> tuple[Tensor, Tensor]:
        """Calls :meth:`run` with replacements for :meth:`parameters_of`."""
        head = self.head(k)
        names = [name for name, _ in head.named_parameters()]
        own = dict(zip(names, parameters, strict=False))
        common = dict(zip(self._common(k), parameters[len(names) :], strict=True))
        state, normed = torch.func.functional_call(head, own, (x, context), common)
        return state, normed

    def _common(self, k: int) -> dict[str, Tensor]:
        """Returns the shared parameters that head ``k`` reads, as keywords of its forward."""
        common: dict[str, Tensor] = {} if self.norm is None else {"shared_norm": self.norm.weight}
        embed = self._borrowed[1]
        if self.head(k).reads_embedding:
            assert embed is not None, "a head that reads the embedding is given one"
            common["embedding"] = embed.weight
        return common

    def _read_alone(self) -> list[nn.Module]:
        """Modules whose parameters are read without calling their forward, where FSDP2 would gather them."""
        unembed, embed = self._borrowed
        return [m for m in (self, self.norm, unembed, embed if self._reads_embed else None) if m is not None]

    def context(self, hidden: Tensor, tokens: Tensor | None, document_ids: Tensor | None) -> Any:
        """Returns the heads' context if the trunk has not run: by default the document ids ``[B, S]``."""
        return document_ids

    def forward(
        self,
        hidden: Tensor,
        labels: Tensor,
        document_ids: Tensor | None = None,
        head_weights: Tensor | Sequence[float] | None = None,
        schedule: str = "sequential",
        **keywords: Unpack[StepKeywords],
    ) -> MultiTokenLoss:
        """Computes the loss of all heads from the trunk's output; see :meth:`mtp_ext.nn.MTPModel.forward`.

        Args:
            hidden: ``[B, S, D]``, from the trunk.
        """
        if hidden.dim() != 3 or hidden.shape[-1] != self.width:
            raise ValueError(f"hidden must be [B, S, D] with D = {self.width}, got {describe(hidden)}")
        check_schedule(schedule)
        batch, seq_len = hidden.shape[:2]
        targets = Targets.checked(
            self, labels, document_ids, head_weights, keywords, batch=batch, seq_len=seq_len, device=hidden.device
        )
        seen = None if document_ids is None else document_ids[:, :seq_len]
        return self.loss(hidden, targets, self.context(hidden, targets.tokens, seen), schedule)

    def loss(self, hidden: Tensor, targets: Targets, context: Any, schedule: str) -> MultiTokenLoss:
        """Runs :meth:`forward` on checked targets and the context of the trunk's forward."""
        with gathered(self._read_alone()) as sharded:
            weight, bias = self._whole_unembedding()
            result = multi_token_loss(self, hidden, weight, context, targets.with_bias(bias), schedule)
        # The sequential schedule does not read the parameters in backward.
        reduce_in_backward(result.loss, sharded, gather=schedule != "sequential")
        return result
