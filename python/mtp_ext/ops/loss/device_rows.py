"""The rows of a loss on a device whose results no host waits for.

A row that takes part without a target is marked -1, and the row kernel turns its logits into zeros. What such a row
holds, NaN included, must not reach a product, so its hidden states are replaced by zeros on the way.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

LARGEST_FLOAT16_SCALE = 4096.0
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def counts_stay_on(device: torch.device) -> bool:
    """Whether the number of rows is left on ``device``."""
    return device.type != "cpu"


def mark_rows(selected: Tensor) -> tuple[Tensor, Tensor]:
    """From the compacted rows that count to a mark for every row.

    Args:
        selected: ``[M]`` int64, the flat indices of the rows that count, then -1.
    Returns:
        ``rows`` ``[M]``, each its own index or -1, and ``valid`` ``[M]`` bool.
    """
    n_rows = selected.shape[0]
    valid = torch.zeros(n_rows + 1, dtype=torch.bool, device=selected.device)  # a last entry for every -1
    valid.index_fill_(0, torch.where(selected < 0, n_rows, selected), True)
    valid = valid[:n_rows]
    return torch.where(valid, torch.arange(n_rows, device=selected.device), -1), valid


def valid_rows_first(valid: Tensor, limits: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The first ``limits[k]`` rows of each head, were those that count moved to the front.

    Args:
        valid: ``[n, R]`` bool, which rows count.
        limits: ``n`` numbers of at most ``R``. A head that may use all rows keeps their order.
    Returns:
        ``flat`` ``[sum(limits)]`` int64, indices into ``n * R`` rows, each once, and whether those count, bool.
    """
    n_rows = valid.shape[1]
    position = torch.arange(n_rows, device=valid.device)
    up_to_here = valid.cumsum(1)
    counts = up_to_here[:, -1:]
    slots = torch.where(valid, up_to_here - 1, counts + position - up_to_here)
    order = torch.empty_like(slots).scatter_(1, slots, position.expand_as(slots))
    flat, found = [], []
    for k, limit in enumerate(limits):
        moves = limit < n_rows
        flat.append((order[k, :limit] if moves else position) + k * n_rows)
        found.append(position[:limit] < counts[k] if moves else valid[k])
    return torch.cat(flat), torch.cat(found)


def copy_valid_rows(source: Tensor, valid: Tensor, out: Tensor) -> None:
    """``out[i] = source[i]`` where ``valid[i]``, else 0: ``[C, D]``, ``[C]``, ``[C, D]``."""
    keep, zero = valid[:, None], source.new_zeros(())
    if source.dtype == out.dtype:
        torch.where(keep, source, zero, out=out)
    else:
        out.copy_(torch.where(keep, source, zero))


def constants(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """``torch.tensor(values)`` made on the device: a copy from pageable memory would wait for the stream."""
    if device.type == "cpu" or not values:
        return torch.tensor(values, dtype=dtype, device=device)
    return torch.stack([torch.full((), value, dtype=dtype, device=device) for value in values])


def float16_scale(rows_per_head: int) -> float:
    """A power of two that lifts the gradient of a mean over up to ``rows_per_head`` rows out of float16's underflow.

    It is divided out of the float32 products with that gradient.
    """
    scale = 1.0
    while 2 * scale <= min(rows_per_head, LARGEST_FLOAT16_SCALE):
        scale *= 2
    return scale


def padded_columns(columns: int, itemsize: int, device: torch.device) -> int:
    """The row stride of a logits buffer: on a GPU a multiple of 16 bytes, so that every row starts at one."""
    width = 1 if device.type == "cpu" else max(1, 16 // itemsize)
    return -(-columns // width) * width


def add_column_sum(x: Tensor, out: Tensor, scale: float) -> None:
    """``out[v] += scale * sum_c x[c, v]``, in ``out``'s dtype."""
    if x.is_cuda and out.dtype == torch.float32 and scale == 1.0:
        torch.ops.mtp_ext._column_sum_(x, out, True)
    else:
        out.add_(x.sum(0, dtype=out.dtype), alpha=scale)


def scaled_on_device(grad: Tensor, by: Tensor, dtype: torch.dtype) -> Tensor:
    """``grad * by`` as ``dtype`` in one pass, ``by`` 0-d; ``grad`` stays as it is."""
    out = torch.empty(grad.shape, dtype=dtype, device=grad.device)
    torch.ops.mtp_ext._scale_into_(grad.contiguous(), by.float().reshape(1), out)
    return out


@torch.library.register_fake("mtp_ext::_column_sum_")  # type: ignore[untyped-decorator]
def _(x: Tensor, out: Tensor, accumulate: bool) -> None:
    if x.dtype not in KERNEL_DTYPES or out.dtype != torch.float32:
        raise TypeError(f"no kernel sums {x.dtype} to {out.dtype}")


@torch.library.register_fake("mtp_ext::_scale_into_")  # type: ignore[untyped-decorator]
def _(x: Tensor, scale: Tensor, out: Tensor) -> None:
    if not {x.dtype, out.dtype} <= set(KERNEL_DTYPES):
        raise TypeError(f"no kernel scales {x.dtype} to {out.dtype}")
