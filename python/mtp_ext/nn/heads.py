"""The prediction heads: head ``k`` in ``1..n`` turns the trunk's output into the prediction of token ``t + k``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mtp_ext.nn.attention import AttentionContext
from mtp_ext.nn.config import MTPConfig, check_implemented
from mtp_ext.nn.layers import Block, RMSNorm, rms_norm
from mtp_ext.nn.schedule import multi_token_loss
from mtp_ext.nn.targets import Targets
from mtp_ext.ops.checks import describe
from mtp_ext.ops.result import MultiTokenLoss


class TransformerHead(nn.Module):
    """One transformer layer and, unless the heads share one, the final norm before the unembedding.

    Args:
        config: The model's.
        layer: The layer's number in the key-value cache.
    """

    def __init__(self, config: MTPConfig, layer: int) -> None:
        super().__init__()
        self.norm_eps = config.norm_eps
        self.block = Block(config, layer)
        self.norm = None if config.shared_final_norm else RMSNorm(config.d_model, config.norm_eps)

    def forward(self, x: Tensor, context: AttentionContext, shared_norm: Tensor | None) -> tuple[Tensor, Tensor]:
        """The layer's output and, normed, what the unembedding takes.

        Args:
            x: ``[B, S, D]``, the trunk's hidden states, or the output of the head before in a chained variant.
            context: That of the trunk's forward.
            shared_norm: ``[D]``, the weight of the shared final norm.
        Returns:
            Two ``[B, S, D]``.
        """
        state: Tensor = self.block(x, context)
        if self.norm is not None:
            return state, self.norm(state)
        assert shared_norm is not None, "a head has its own final norm or is given the shared one"
        return state, rms_norm(state, shared_norm, self.norm_eps)


class MTPHeads(nn.Module):
    """The ``n`` heads of a model. Their parameters are ``0.*`` for head 1 to ``{n-1}.*``, and ``norm`` if shared.

    ``chains`` is the order in which heads run: the first head of a chain reads the trunk, each other one the layer
    output of the head before it. In the parallel variant every head is a chain of its own.

    Args:
        config: The model's.
        unembed: The unembedding ``[V, D]``; the model owns it, the heads borrow it.
    """

    def __init__(self, config: MTPConfig, unembed: nn.Linear) -> None:
        super().__init__()
        check_implemented(config.variant)
        self.config = config
        self.n_heads = config.n_future
        self.chains: tuple[tuple[int, ...], ...] = tuple((k,) for k in range(1, self.n_heads + 1))
        self._borrowed = (unembed,)  # in a tuple, so that it is not registered twice
        for k in range(self.n_heads):
            self.add_module(str(k), TransformerHead(config, config.n_trunk_layers + k))
        self.norm = RMSNorm(config.d_model, config.norm_eps) if config.shared_final_norm else None

    def head(self, k: int) -> TransformerHead:
        """Head ``k``, 1-based."""
        head = self.get_submodule(str(k - 1))
        assert isinstance(head, TransformerHead)
        return head

    @property
    def unembedding(self) -> Tensor:
        """``[V, D]``, shared by all heads."""
        return self._borrowed[0].weight

    @property
    def shared_norm(self) -> Tensor | None:
        """The weight of the final norm, if the heads share one."""
        return None if self.norm is None else self.norm.weight

    def run(self, k: int, x: Tensor, context: AttentionContext) -> tuple[Tensor, Tensor]:
        """Head ``k``'s layer output and its normed output, two ``[B, S, D]``; recorded by autograd as any module."""
        state, normed = self.head(k)(x, context, self.shared_norm)
        return state, normed

    def parameters_of(self, k: int) -> list[Tensor]:
        """What head ``k`` reads beside its input, in a fixed order; heads may have parameters in common."""
        shared = self.shared_norm
        return [*self.head(k).parameters(), *([] if shared is None else [shared])]

    def run_with(
        self, k: int, parameters: Sequence[Tensor], x: Tensor, context: AttentionContext
    ) -> tuple[Tensor, Tensor]:
        """:meth:`run` with stand-ins for :meth:`parameters_of`."""
        head = self.head(k)
        names = [name for name, _ in head.named_parameters()]
        own = dict(zip(names, parameters, strict=False))
        shared = None if self.norm is None else parameters[len(names)]
        state, normed = torch.func.functional_call(head, own, (x, context, shared), strict=True)
        return state, normed

    def forward(
        self,
        hidden: Tensor,
        labels: Tensor,
        document_ids: Tensor | None = None,
        head_weights: Tensor | Sequence[float] | None = None,
        schedule: str = "sequential",
        *,
        normalizer: str | float | Tensor = "per_head",
        ignore_index: int = -100,
        chunk_rows: int | None = None,
        workspace_bytes: int | None = None,
    ) -> MultiTokenLoss:
        """The loss of all heads on the trunk's output; see :meth:`mtp_ext.nn.MTPModel.forward`.

        Args:
            hidden: ``[B, S, D]``, from the trunk.
        """
        if hidden.dim() != 3 or hidden.shape[-1] != self.config.d_model:
            raise ValueError(f"hidden must be [B, S, D] with D = {self.config.d_model}, got {describe(hidden)}")
        targets = Targets.checked(
            labels,
            batch=hidden.shape[0],
            seq_len=hidden.shape[1],
            n_heads=self.n_heads,
            device=hidden.device,
            document_ids=document_ids,
            head_weights=head_weights,
            normalizer=normalizer,
            ignore_index=ignore_index,
            chunk_rows=chunk_rows,
            workspace_bytes=workspace_bytes,
        )
        seen = None if document_ids is None else document_ids[:, : hidden.shape[1]]
        context = AttentionContext.of_sequences(self.config, hidden.shape[1], seen, hidden.device, hidden.dtype)
        return self.loss(hidden, targets, context, schedule)

    def loss(self, hidden: Tensor, targets: Targets, context: AttentionContext, schedule: str) -> MultiTokenLoss:
        """:meth:`forward` with checked targets and the context of the trunk's forward."""
        return multi_token_loss(self, hidden, self.unembedding, context, targets, schedule)
