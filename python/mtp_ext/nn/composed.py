"""A model composed of user-defined trunk and heads."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from mtp_ext.nn.heads.head import HeadModules, make_heads
from mtp_ext.nn.heads.heads import Heads
from mtp_ext.nn.multi_token_model import MultiTokenModel
from mtp_ext.nn.transformer.attention import Attention
from mtp_ext.nn.transformer.checks import check_document_ids
from mtp_ext.nn.transformer.kv_cache import KVCache
from mtp_ext.nn.transformer.token_tree import TokenTree
from mtp_ext.ops.common.checks import INDEX_DTYPES, check_tensor, describe


class ComposedModel(MultiTokenModel):
    """A model from your own trunk and heads, with the head order of any variant and with every schedule.

    Args:
        trunk: ``tokens [B, S] -> hidden [B, S, D]``; with a second positional parameter it also gets ``document_ids
            [B, S]`` or None. A trunk with a method ``context(tokens, document_ids)``, such as
            :class:`mtp_ext.nn.transformer.trunk.Trunk`, is called as ``trunk(tokens, context=...)``.
        heads: ``n`` modules, or a function that makes head ``k`` in ``1..n``. Each maps ``[B, S, D]`` to ``[B, S, D]``;
            with a second positional parameter it also gets the trunk's context (or, if the trunk has none, the document
            ids). Each gets its own final RMSNorm; pass :class:`mtp_ext.nn.Head` to choose another.
        unembed: A module with ``weight [V, D]`` or ``[n, V, D]``, such as :class:`torch.nn.Linear`.
        variant: Determines the order of the heads: "causal" chains head 1 to ``n``, "anticausal" ``n`` to 1; in the
            others every head reads the trunk.
        n_future: ``n``; required if ``heads`` is a function.
        softcap: Soft cap of the logits.
    Raises:
        TypeError, ValueError: A wrong argument.
    """

    def __init__(
        self,
        trunk: nn.Module,
        heads: HeadModules,
        unembed: nn.Module,
        *,
        variant: str = "parallel",
        n_future: int | None = None,
        softcap: float | None = None,
    ) -> None:
        weight = getattr(unembed, "weight", None)
        if not isinstance(weight, Tensor) or weight.dim() not in (2, 3):
            raise TypeError(f"unembed must have a weight [V, D] or [n, V, D], got {describe(weight)}")
        width = weight.shape[-1]
        made = make_heads(heads, n_future, width)
        if weight.dim() == 3 and weight.shape[0] != len(made):
            raise ValueError(f"unembed must have a weight [n, V, D] with n = {len(made)}, got {describe(weight)}")
        super().__init__(trunk, Heads(made, unembed, variant=variant, width=width, softcap=softcap), unembed)
        self.variant = variant
        self._has_context = callable(getattr(trunk, "context", None))
        parameters = list(inspect.signature(trunk.forward).parameters.values())
        self._takes_documents = len([p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]) >= 2

    def prepare(self, tokens: Tensor, document_ids: Tensor | None) -> Any:
        check_tensor("tokens", tokens, dtypes=INDEX_DTYPES, shape="[B, S]")
        if tokens.dim() != 2:
            raise ValueError(f"tokens must be [B, S], got {describe(tokens)}")
        if document_ids is not None:
            check_document_ids(document_ids, tokens)
            if not self._takes_documents and not self._has_context:
                raise ValueError("document_ids must be None: the trunk does not take them and would mix documents")
            document_ids = document_ids[:, : tokens.shape[1]]
        if not self._has_context:
            return document_ids
        make: Callable[[Tensor, Tensor | None], Any] = self.trunk.context  # type: ignore[assignment]
        return make(tokens, document_ids)

    def run_trunk(self, tokens: Tensor, document_ids: Tensor | None, context: Any) -> Tensor:
        if self._has_context:
            hidden: Tensor = self.trunk(tokens, context=context)
        else:
            hidden = self.trunk(tokens, context) if self._takes_documents else self.trunk(tokens)
        if hidden.shape != (*tokens.shape, self.heads.width):
            raise ValueError(f"trunk must give [B, S, D] = {[*tokens.shape, self.heads.width]}, got {describe(hidden)}")
        return hidden

    def check_decoding(self) -> None:
        if not self._has_context or "cache" not in inspect.signature(self.trunk.context).parameters:  # type: ignore[arg-type]
            raise TypeError(
                "model must have a trunk that decodes, with a method context(tokens, document_ids, cache) such as "
                f"mtp_ext.nn.transformer.trunk.Trunk's, got {type(self.trunk).__name__}"
            )
        layers = [module.layer for module in self.modules() if isinstance(module, Attention)]
        if twice := sorted({layer for layer in layers if layers.count(layer) > 1}):
            raise ValueError(
                f"model must have a layer index of its own in each attention layer of trunk and heads, because the "
                f"key-value cache is kept by it, got {twice[0]} twice"
            )

    def cached_context(self, tokens: Tensor, cache: KVCache, tree: TokenTree | None = None) -> Any:
        make: Callable[..., Any] = self.trunk.context  # type: ignore[assignment]
        if tree is None:
            return make(tokens, None, cache=cache)
        if "tree" not in inspect.signature(make).parameters:
            raise TypeError(
                "tree must be None for a trunk whose method context has no parameter tree, as that of "
                f"{type(self.trunk).__name__}"
            )
        return make(tokens, None, cache=cache, tree=tree)
