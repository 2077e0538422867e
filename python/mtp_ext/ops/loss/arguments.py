"""One call of a loss: its arguments as one object, from the public functions and the models down to the kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from mtp_ext.ops.common import checks
from mtp_ext.ops.loss.options import RowOptions


class Needs(NamedTuple):
    """Which gradients a call has to form."""

    hidden: bool
    weight: bool
    bias: bool

    @staticmethod
    def of(call: LossCall, weight: Tensor, hidden: Sequence[Tensor]) -> Needs:
        """Those that autograd will ask for; that of the weight also where it goes into a buffer."""
        if not torch.is_grad_enabled():
            return Needs(False, False, False)
        return Needs(
            any(h.requires_grad for h in hidden),
            weight.requires_grad or call.grad_weight_out is not None,
            call.bias is not None and call.bias.requires_grad,
        )


class PackedCall(NamedTuple):
    """A :class:`LossCall` as an operator's arguments; the names are those of the schemas in ``operators.py``."""

    tensors: list[Tensor | None]
    options: list[float]
    sizes: list[int]
    detach_weight: list[int]
    max_valid: list[int]
    compute_dtype: torch.dtype
    group_name: str


class Gradients(NamedTuple):
    """The gradients of a loss; None, or an empty sequence, for those that were not needed."""

    weight: Tensor | None  # its shape, float32 (float64 for float64 operands)
    bias: Tensor | None  # [V], likewise
    hidden: Sequence[Tensor | None]  # in the form of hidden, in saved_grad_dtype


@dataclass
class WeightSums:
    """Where the gradients of weight and bias are summed over the heads of a step; None where they are not needed."""

    weight: Tensor | None  # [V, D]; of replicated unembeddings [n, V, D]; uninitialised before the first head
    bias: Tensor | None  # [V]
    accumulate: bool = False  # weight is one for all heads, and holds the gradient of those before


def saved_grad_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype that a gradient of ``hidden`` is kept in from forward to backward.

    The loss scale that keeps float16 gradients from underflowing arrives with the backward: until then, float32.
    """
    return torch.float32 if hidden.dtype == torch.float16 else hidden.dtype


@dataclass(frozen=True)
class LossCall:
    """The arguments of a loss but for hidden states and weight; :func:`mtp_ext.multi_token_cross_entropy` has them all.

    Row ``(k, b, s)`` of the flat rows ``[n * B * S]`` predicts ``labels[b, s + first_shift + k]``, ``k = 0..n-1``.
    """

    labels: Tensor  # [B, S']
    seq_len: int  # S
    n_heads: int  # n
    first_shift: int  # of head 1: 1 for the next token, 0 for targets that lie at their positions
    compute_dtype: torch.dtype  # what hidden states and weight are rounded to before they are multiplied
    options: RowOptions = field(default_factory=RowOptions)
    bias: Tensor | None = None  # [V]
    head_weights: Tensor | None = None  # [n]
    document_ids: Tensor | None = None  # [B, S']
    token_weights: Tensor | None = None  # [B, S']
    normalizer: str | float | Tensor = "per_head"
    reduction: str = "mean"
    ignore_index: int = -100
    detach_weight: frozenset[int] = frozenset()  # 1-based heads
    max_valid: list[int] | None = None  # [n]
    chunk_rows: int | None = None
    workspace_bytes: int | None = None
    grad_weight_out: Tensor | None = None  # of weight's shape
    group: torch.distributed.ProcessGroup | None = None
    with_metrics: bool = True
    row_scale: Tensor | None = None  # [n * B * S], an incoming gradient of each row's loss
    lse_grad: Tensor | None = None  # [n * B * S], of each row's log-sum-exp

    def check(self, weight: Tensor) -> None:
        """Raises TypeError or ValueError for the first wrong argument among those that every loss has."""
        device, vocab_size = weight.device, weight.shape[-2]
        checks.check_vector("bias", self.bias, vocab_size, "V", checks.FLOAT_DTYPES, device)
        self.options.check(vocab_size, device)
        checks.check_int("ignore_index", self.ignore_index)
        checks.check_positive_int("chunk_rows", self.chunk_rows)
        checks.check_positive_int("workspace_bytes", self.workspace_bytes)
        checks.check_grad_weight_out(self.grad_weight_out, weight)
        checks.check_group(self.group)
        checks.check_reduction(self.reduction)

    @property
    def row_shape(self) -> tuple[int, int]:
        """``(B, S)``."""
        return self.labels.shape[0], self.seq_len

    @property
    def rows_per_head(self) -> int:
        """``B * S``."""
        return self.labels.shape[0] * self.seq_len

    @property
    def acc_dtype(self) -> torch.dtype:
        """That of results, sums and the weight's gradient: float32, or float64 for float64 operands."""
        return torch.float64 if self.compute_dtype == torch.float64 else torch.float32

    @property
    def divisor(self) -> float | Tensor | None:
        """What each head's sum is divided by; None: the sum of its targets' weights."""
        if self.reduction != "mean":
            return 1.0
        return None if isinstance(self.normalizer, str) else self.normalizer

    def of_heads(self, heads: range) -> LossCall:
        """The part of heads ``k`` in ``heads``, 0-based and consecutive; ``max_valid`` is left out."""
        if len(heads) == self.n_heads:
            return self
        first, last = heads.start, heads.stop
        rows = slice(first * self.rows_per_head, last * self.rows_per_head)
        return replace(
            self,
            n_heads=len(heads),
            first_shift=self.first_shift + first,
            head_weights=None if self.head_weights is None else self.head_weights[first:last],
            detach_weight=frozenset(k - first for k in self.detach_weight if first < k <= last),
            max_valid=None,
            row_scale=None if self.row_scale is None else self.row_scale[rows],
            lse_grad=None if self.lse_grad is None else self.lse_grad[rows],
        )

    def pack(self) -> PackedCall:
        """The call as an operator's arguments; :meth:`unpack` is the inverse, as far as an operator needs it."""
        divisor = self.divisor
        number = divisor if isinstance(divisor, (int, float)) else 0.0  # never 0 itself
        return PackedCall(
            tensors=[
                self.labels,
                self.document_ids,
                self.token_weights,
                self.options.class_weights,
                self.bias,
                self.head_weights,
                divisor if isinstance(divisor, Tensor) else None,
                self.row_scale,
                self.lse_grad,
            ],
            options=[*self.options.pack(), number],
            sizes=[
                self.seq_len,
                self.n_heads,
                self.first_shift,
                self.ignore_index,
                self.chunk_rows or 0,
                self.workspace_bytes or 0,
                int(self.with_metrics),
            ],
            detach_weight=sorted(self.detach_weight),
            max_valid=self.max_valid or [],
            compute_dtype=self.compute_dtype,
            group_name="" if self.group is None else self.group.group_name,
        )

    @staticmethod
    def unpack(packed: PackedCall) -> LossCall:
        """The call that :meth:`pack` took apart, without ``reduction`` and ``grad_weight_out``."""
        labels, document_ids, token_weights, class_weights, bias, head_weights, divisor, *row_gradients = packed.tensors
        *options, number = packed.options
        seq_len, n_heads, first_shift, ignore_index, chunk_rows, workspace_bytes, with_metrics = packed.sizes
        assert labels is not None
        return LossCall(
            labels=labels,
            seq_len=seq_len,
            n_heads=n_heads,
            first_shift=first_shift,
            compute_dtype=packed.compute_dtype,
            options=RowOptions.unpack(options, class_weights),
            bias=bias,
            head_weights=head_weights,
            document_ids=document_ids,
            token_weights=token_weights,
            normalizer=divisor if divisor is not None else (number or "per_head"),
            ignore_index=ignore_index,
            detach_weight=frozenset(packed.detach_weight),
            max_valid=packed.max_valid or None,
            chunk_rows=chunk_rows or None,
            workspace_bytes=workspace_bytes or None,
            group=_group(packed.group_name),
            with_metrics=bool(with_metrics),
            row_scale=row_gradients[0],
            lse_grad=row_gradients[1],
        )


def _group(name: str) -> torch.distributed.ProcessGroup | None:
    if not name:
        return None
    group: torch.distributed.ProcessGroup = torch.distributed.distributed_c10d._resolve_process_group(name)  # type: ignore[attr-defined,arg-type]
    return group
