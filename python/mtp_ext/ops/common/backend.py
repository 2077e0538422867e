"""What differs between devices above the kernels: one :class:`Backend` per device type, found by :func:`backend_of`.

Everything else in the package asks the backend instead of the device, so :func:`use_backend` runs the Python path of a
GPU on CPU tensors (``tests/support/pretend_cuda.py``), or the chunk loop in the place of the CPU's native call.
"""

from __future__ import annotations

import functools
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mtp_ext import _C

# The dtypes of the CUDA kernels.
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The device types that this build has kernels for; read at import, because torch.compile cannot trace the question.
_BUILT = tuple(
    device
    for device, key in (("cpu", "CPU"), ("cuda", "CUDA"))
    if torch._C._dispatch_has_kernel_for_dispatch_key("mtp_ext::_loss_rows_", key)
)

_TILE_ROWS = 4096


class Backend:
    """A device type that this package has no code for, and the base of those that it has.

    Args:
        device_type: As in :class:`torch.device`.
    """

    sees_values = False
    """Whether the host may read a tensor's values without waiting for the device."""
    native_loss = False
    """Whether the loss of all heads is one native call."""
    has_kernels = False
    """Whether norms and decoding have kernels of their own (:meth:`rms_norm_heads`, :meth:`decode`)."""

    ops: Any = torch.ops.mtp_ext
    """The native operators."""

    def __init__(self, device_type: str) -> None:
        self.device_type, self.is_built = device_type, device_type in _BUILT

    def check_built(self) -> None:
        """Raises RuntimeError where this build has no kernels of the loss for the device."""
        if not self.is_built:
            raise RuntimeError(
                f"mtp_ext has no kernels for {self.device_type} tensors in this build (it has: {', '.join(_BUILT)}); "
                "for CUDA, reinstall where torch has CUDA and nvcc exists: MTP_EXT_CUDA=1 pip install "
                "--no-build-isolation ."
            )

    def logits_dtype(self, compute_dtype: torch.dtype) -> torch.dtype:
        """The dtype of logits whose operands are rounded to ``compute_dtype``: the same where its GEMM is fast."""
        return compute_dtype

    def row_stride(self, columns: int, itemsize: int) -> int:
        """Elements from one row of a logits buffer to the next."""
        return columns

    def constants(self, values: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
        """``torch.tensor(values)`` on ``device``, without a synchronisation."""
        # A copy from pageable host memory would wait for the stream.
        made = [torch.full((), value, dtype=dtype, device=device) for value in values]
        return torch.stack(made) if made else torch.empty(0, dtype=dtype, device=device)

    def loss_rows_(self, *arguments: Any) -> None:
        """The row kernel; see ``loss_rows_`` in :mod:`mtp_ext.ops.loss.row_kernels`."""
        self.ops._loss_rows_(*arguments)

    def decode(self, hidden: Tensor, weight: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor]:
        """The ``top`` largest logits of each row, their classes (int32), and the rows' log-sum-exp."""
        found: tuple[Tensor, Tensor, Tensor] = self.ops._decode(hidden, weight, top)
        return found

    def rms_norm_heads(self, x: Tensor, weights: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """The ``n`` norms of ``x [T, D]``, ``[n, T, D]``, and ``1 / sqrt(mean(x ** 2) + eps) [T]``."""
        found: tuple[Tensor, Tensor] = self.ops._rms_norm_heads(x, weights, eps)
        return found

    def rms_norm_heads_backward(self, grad: Tensor, x: Tensor, weights: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients of ``x`` and ``weights``."""
        found: tuple[Tensor, Tensor] = self.ops._rms_norm_heads_backward(grad, x, weights, rstd)
        return found

    def matmul_(self, out: Tensor, a: Tensor, b: Tensor, *, beta: float = 0.0, alpha: float = 1.0) -> Tensor:
        """``out = beta * out + alpha * a @ b`` in ``out``'s dtype; with ``beta`` 0 the old ``out`` is not read."""
        if out.dtype == a.dtype:
            if beta == 0.0 and alpha == 1.0:
                return torch.mm(a, b, out=out)
            return torch.addmm(out, a, b, beta=beta, alpha=alpha, out=out)
        # torch's GEMM has no float32 result for 16-bit operands but on CUDA: one tile of products at a time.
        for begin in range(0, len(out), _TILE_ROWS):
            tile = out[begin : begin + _TILE_ROWS]
            product = torch.mm(a[begin : begin + _TILE_ROWS], b).to(out.dtype)
            tile.copy_(product.mul_(alpha) if beta == 0.0 else product.mul_(alpha).add_(tile, alpha=beta))
        return out

    def add_column_sum_(self, out: Tensor, x: Tensor, scale: float) -> None:
        """``out[v] += scale * sum_c x[c, v]``, in ``out``'s dtype."""
        out.add_(x.sum(0, dtype=out.dtype), alpha=scale)

    def scaled(
        self, grads: Sequence[Tensor | None], by: Tensor, dtypes: Sequence[torch.dtype | None]
    ) -> list[Tensor | None]:
        """``grads[i] * by`` as ``dtypes[i]``, ``by`` 0-d and of 32 bits or more; never in place."""
        return [None if x is None else self._scaled(x, by, d) for x, d in zip(grads, dtypes, strict=True)]

    def _scaled(self, x: Tensor, by: Tensor, dtype: torch.dtype | None) -> Tensor:
        wide = x if x.dtype.itemsize > 2 else x.to(by.dtype)  # a loss scale of 65536 is infinite in float16
        return (wide * by).to(dtype)


class CpuBackend(Backend):
    """The CPU.

    Args:
        native_loss: False runs the chunk loop of :mod:`mtp_ext.ops.loss.row_loop` instead of the native call.
        fast_bfloat16: Whether bfloat16 logits are multiplied as such; default: where the processor does so natively.
    """

    sees_values = True

    def __init__(self, *, native_loss: bool = True, fast_bfloat16: bool | None = None) -> None:
        super().__init__("cpu")
        self.native_loss, self._fast_bfloat16 = native_loss, fast_bfloat16

    def logits_dtype(self, compute_dtype: torch.dtype) -> torch.dtype:
        if compute_dtype.itemsize != 2:
            return compute_dtype
        fast = has_fast_bfloat16_gemm() if self._fast_bfloat16 is None else self._fast_bfloat16
        return compute_dtype if compute_dtype == torch.bfloat16 and fast else torch.float32

    def constants(self, values: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    def scaled(
        self, grads: Sequence[Tensor | None], by: Tensor, dtypes: Sequence[torch.dtype | None]
    ) -> list[Tensor | None]:
        if not torch.compiler.is_compiling() and by.item() == 1.0:
            return [x if x is None or x.dtype == d else x.to(d) for x, d in zip(grads, dtypes, strict=True)]
        return super().scaled(grads, by, dtypes)


class CudaBackend(Backend):
    """CUDA: no synchronisation, GEMMs of 16-bit operands with a float32 result, and the kernels that only CUDA has.

    Args:
        is_built: Whether the build has its kernels; default: whether it has.
    """

    def __init__(self, *, is_built: bool | None = None) -> None:
        super().__init__("cuda")
        self.is_built = self.is_built if is_built is None else is_built
        self.has_kernels = self.is_built

    def row_stride(self, columns: int, itemsize: int) -> int:
        width = max(1, 16 // itemsize)  # every row starts at a multiple of 16 bytes
        return -(-columns // width) * width

    def matmul_(self, out: Tensor, a: Tensor, b: Tensor, *, beta: float = 0.0, alpha: float = 1.0) -> Tensor:
        if out.dtype == a.dtype:
            return super().matmul_(out, a, b, beta=beta, alpha=alpha)
        return self.matmul_wide_(out, a, b, beta, alpha)

    def matmul_wide_(self, out: Tensor, a: Tensor, b: Tensor, beta: float, alpha: float) -> Tensor:
        """:meth:`matmul_` of 16-bit operands with a float32 result."""
        if beta == 0.0 and alpha == 1.0:
            return torch.mm(a, b, out_dtype=out.dtype, out=out)
        return torch.addmm(out, a, b, out_dtype=out.dtype, beta=beta, alpha=alpha, out=out)

    def add_column_sum_(self, out: Tensor, x: Tensor, scale: float) -> None:
        if out.dtype == torch.float32 and scale == 1.0:
            self.ops._column_sum_(x, out, True)
        else:
            super().add_column_sum_(out, x, scale)

    def _scaled(self, x: Tensor, by: Tensor, dtype: torch.dtype | None) -> Tensor:
        if torch.float64 in (x.dtype, dtype):  # the kernel has no float64
            return super()._scaled(x, by, dtype)
        out = torch.empty(x.shape, dtype=dtype, device=x.device)
        self.ops._scale_into_(x.contiguous(), by.float().reshape(1), out)
        return out


@functools.cache
def has_fast_bfloat16_gemm() -> bool:
    """Whether this CPU multiplies bfloat16 natively; without it, torch's bfloat16 GEMM is 10-100 times slower.

    ``MTP_EXT_CPU_CAPABILITY=avx2`` (or ``plain``) says no, as a processor without AVX-512 would.
    """
    if platform.machine() not in ("x86_64", "AMD64") or _C.build_info()["cpu_capability"] != "avx512":
        return False
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


_BACKENDS: dict[str, Backend] = {"cpu": CpuBackend(), "cuda": CudaBackend()}
forced: Backend | None = None


def backend_of(device: torch.device) -> Backend:
    """The backend of a device."""
    return forced or _BACKENDS.get(device.type) or Backend(device.type)


@contextmanager
def use_backend(backend: Backend) -> Iterator[None]:
    """Makes ``backend`` that of every device, to run one device's path on another: for tests."""
    global forced
    before, forced = forced, backend
    try:
        yield
    finally:
        forced = before
