"""The arguments of a loss as one object, from the public functions and the models down to the kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from mtp_ext.ops.common import checks
from mtp_ext.ops.common.workspace import empty
from mtp_ext.ops.loss.options import RowOptions


class Needs(NamedTuple):
    """Which gradients a call must compute."""

    hidden: bool
    weight: bool
    bias: bool

    @staticmethod
    def of(call: LossCall, weight: Tensor, hidden: Sequence[Tensor]) -> Needs:
        """Returns the gradients that autograd will ask for; with ``grad_weight_out``, always the weight's."""
        if not torch.is_grad_enabled():
            return Needs(False, False, False)
        return Needs(
            any(h.requires_grad for h in hidden),
            weight.requires_grad or call.grad_weight_out is not None,
            call.bias is not None and call.bias.requires_grad,
        )


class PackedCall(NamedTuple):
    """A :class:`LossCall` as operator arguments, named as in the schemas in ``operators.py``."""

    tensors: list[Tensor | None]
    options: list[float]
    sizes: list[int]
    detach_weight: list[int]
    max_valid: list[int]
    compute_dtype: torch.dtype
    group_name: str


class Gradients(NamedTuple):
    """The gradients of a loss; None, or an empty sequence, if not needed."""

    weight: Tensor | None  # weight's shape, float32 (float64 for float64 operands)
    bias: Tensor | None  # [V], likewise
    hidden: Sequence[Tensor | None]  # in the form of hidden, in saved_grad_dtype


@dataclass
class WeightSums:
    """Buffers for the sums of the weight and bias gradients over the heads of a step; None if not needed."""

    weight: Tensor | None  # [V, D], or [n, V, D] if replicated; uninitialised before the first head
    bias: Tensor | None  # [V]
    accumulate: bool = False  # weight already holds a gradient: of earlier heads if it is shared, or the caller's

    @staticmethod
    def of(
        call: LossCall,
        weight: Tensor,
        needs: Needs,
        *,
        buffer: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> WeightSums:
        """Allocates the buffers that a step needs.

        Args:
            call: The call.
            weight: ``[V, D]`` or ``[n, V, D]``.
            needs: Which gradients to compute.
            buffer: The caller's, to which the weight's gradient is added; default a new one.
            dtype: Of a new one; default the accumulation dtype.
        """
        shape, device = weight.shape, weight.device
        bias = torch.zeros(shape[-2], dtype=call.acc_dtype, device=device) if needs.bias else None
        if not needs.weight:
            return WeightSums(None, bias)
        return WeightSums(
            empty(shape, dtype or call.acc_dtype, device) if buffer is None else buffer, bias, buffer is not None
        )


def saved_grad_dtype(hidden: Tensor) -> torch.dtype:
    """Returns the dtype in which the gradient of ``hidden`` is kept from forward to backward.

    float32 for float16: the loss scale that prevents underflow is only known in backward.
    """
    return torch.float32 if hidden.dtype == torch.float16 else hidden.dtype


@dataclass(frozen=True)
class LossCall:
    """All arguments of :func:`mtp_ext.multi_token_cross_entropy` except hidden states and weight, and internal ones.

    Row ``(k, b, s)`` of the flat rows ``[n * B * S]`` predicts ``labels[b, s + first_shift + k]``, ``k = 0..n-1``.
    """

    labels: Tensor  # [B, S']
    seq_len: int  # S
    n_heads: int  # n
    first_shift: int  # shift of head 1: 1 for the next token, 0 for targets at their own positions
    compute_dtype: torch.dtype  # the dtype of the GEMM operands
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
    grad_weight_out: Tensor | None = None  # weight's shape
    grad_scale: float | Tensor | None = None  # the loss's incoming gradient, known beforehand
    group: torch.distributed.ProcessGroup | None = None
    with_metrics: bool = True
    row_scale: Tensor | None = None  # [n * B * S], incoming gradient of each row's loss
    lse_grad: Tensor | None = None  # [n * B * S], incoming gradient of each row's log-sum-exp

    N_TENSORS: ClassVar[int] = 4  # of without_tensors()

    def check(self, weight: Tensor) -> None:
        """Raises TypeError or ValueError for the first wrong argument that all losses share."""
        device, vocab_size = weight.device, weight.shape[-2]
        checks.check_vector("bias", self.bias, vocab_size, "V", checks.FLOAT_DTYPES, device)
        self.options.check(vocab_size, device)
        checks.check_grad_weight_out(self.grad_weight_out, weight)
        checks.check_group(self.group)
        checks.check_reduction(self.reduction)
        self.check_values()

    def check_values(self) -> None:
        """The part of :meth:`check` that needs no weight."""
        checks.check_int("ignore_index", self.ignore_index)
        checks.check_positive_int("chunk_rows", self.chunk_rows)
        checks.check_positive_int("workspace_bytes", self.workspace_bytes)
        checks.check_constant("token_weights", self.token_weights)
        checks.check_constant("class_weights", self.options.class_weights)
        checks.check_constant("normalizer", self.normalizer)
        checks.check_constant("grad_scale", self.grad_scale)

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
        """The dtype of results, sums and the weight's gradient: float32, or float64 for float64 operands."""
        return torch.float64 if self.compute_dtype == torch.float64 else torch.float32

    @property
    def divisor(self) -> float | Tensor | None:
        """The divisor of each head's sum; None for the sum of its targets' weights."""
        if self.reduction != "mean":
            return 1.0
        return None if isinstance(self.normalizer, str) else self.normalizer

    def without_tensors(self) -> tuple[LossCall, list[Tensor | None]]:
        """Splits off the tensors that backward reads again, so that autograd can save them and notice in-place changes.

        Bias and gradient buffer stay: the bias is saved as an input, and the buffer is changed on purpose.
        """
        tensors = [self.labels, self.document_ids, self.token_weights, self.options.class_weights]
        options = replace(self.options, class_weights=None)
        return replace(self, document_ids=None, token_weights=None, options=options), tensors

    def with_tensors(self, tensors: Sequence[Tensor | None]) -> LossCall:
        """The inverse of :meth:`without_tensors`."""
        labels, document_ids, token_weights, class_weights = tensors
        assert labels is not None
        options = replace(self.options, class_weights=class_weights)
        return replace(self, labels=labels, document_ids=document_ids, token_weights=token_weights, options=options)

    def for_backward(self, of_losses: Tensor, of_lse: Tensor) -> LossCall:
        """Returns the call that computes gradients from the incoming ones of the rows' losses and log-sum-exps."""
        return replace(
            self, head_weights=None, normalizer=1.0, row_scale=of_losses.reshape(-1), lse_grad=of_lse.reshape(-1)
        )

    def of_heads(self, heads: range) -> LossCall:
        """Returns the call for ``heads``, 0-based and consecutive, without ``max_valid``."""
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
        """Returns the call as operator arguments; :meth:`unpack` is the inverse."""
        divisor = self.divisor
        number = divisor if isinstance(divisor, (int, float)) else 0.0  # 0 means none: a divisor is never 0
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
                checks.python_number(self.ignore_index),
                checks.python_number(self.chunk_rows or 0),
                checks.python_number(self.workspace_bytes or 0),
                int(self.with_metrics),
            ],
            detach_weight=sorted(self.detach_weight),
            max_valid=self.max_valid or [],
            compute_dtype=self.compute_dtype,
            group_name="" if self.group is None else self.group.group_name,
        )

    @staticmethod
    def unpack(packed: PackedCall) -> LossCall:
        """Rebuilds a call from :meth:`pack`, without ``reduction`` and ``grad_weight_out``."""
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
