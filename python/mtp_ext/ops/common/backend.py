"""Device-specific behaviour above the kernels: one :class:`Backend` per device type, looked up by :func:`backend_of`.

The rest of the package asks the backend instead of the device, so :func:`use_backend` can run a GPU's Python path on
CPU tensors (``tests/support/pretend_cuda.py``), or the chunk loop instead of the native CPU call.
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
from mtp_ext.ops.common.transforms import is_written_down

# The dtypes of the CUDA kernels.
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The device types that this build has kernels for; read at import, because torch.compile cannot trace the query.
_BUILT = tuple(
    device
    for device, key in (("cpu", "CPU"), ("cuda", "CUDA"))
    if torch._C._dispatch_has_kernel_for_dispatch_key("mtp_ext::_loss_rows_", key)
)

_TILE_ROWS = 4096
_PLAIN_TYPES = (Tensor, torch.nn.Parameter)


class Backend:
    """The base of all backends, and the backend of device types without code of their own.

    Args:
        device_type: As in :class:`torch.device`.
    """

    sees_values = False
    """True if the host can read a tensor's values without a sync."""
    native_loss = False
    """True if one native call computes the loss of all heads."""
    has_kernels = False
    """True if norms and decoding have kernels (:meth:`rms_norm_heads`, :meth:`decode`)."""

    ops: Any = torch.ops.mtp_ext
    """The native operators."""

    def __init__(self, device_type: str) -> None:
        self.device_type, self.is_built = device_type, device_type in _BUILT

    def check_built(self) -> None:
        """Raises RuntimeError if this build has no loss kernels for the device."""
        if not self.is_built:
            raise RuntimeError(
                f"mtp_ext has no kernels for {self.device_type} tensors in this build (it has: {', '.join(_BUILT)}); "
                "for CUDA, reinstall where torch has CUDA and nvcc exists: MTP_EXT_CUDA=1 pip install "
                "--no-build-isolation ."
            )

    def logits_dtype(self, compute_dtype: torch.dtype) -> torch.dtype:
        """The dtype of logits from operands in ``compute_dtype``: the same if its GEMM is fast."""
        return compute_dtype

    def shard_logits_dtype(self, compute_dtype: torch.dtype) -> torch.dtype:
        """Like :meth:`logits_dtype`, for a shard of the vocabulary, whose rows are read twice."""
        return torch.promote_types(compute_dtype, torch.float32)

    def row_stride(self, columns: int, itemsize: int) -> int:
        """The row stride of a logits buffer, in elements."""
        return columns

    def constants(self, values: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Returns ``torch.tensor(values)`` on ``device``, without a GPU sync."""
        # A copy from pageable host memory would wait for the stream.
        made = [torch.full((), value, dtype=dtype, device=device) for value in values]
        return torch.stack(made) if made else torch.empty(0, dtype=dtype, device=device)

    def loss_rows_(self, *arguments: Any) -> None:
        """Runs the row kernel; see ``loss_rows_`` in :mod:`mtp_ext.ops.loss.row_kernels`."""
        self.ops._loss_rows_(*arguments)

    def decode(self, hidden: Tensor, weight: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the ``top`` largest logits of each row, their classes (int32), and the rows' log-sum-exp."""
        found: tuple[Tensor, Tensor, Tensor] = self.ops._decode(hidden, weight, top)
        return found

    def rms_norm_heads(self, x: Tensor, weights: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """Returns the ``n`` norms of ``x [T, D]``, ``[n, T, D]``, and ``1 / sqrt(mean(x ** 2) + eps) [T]``."""
        found: tuple[Tensor, Tensor] = self.ops._rms_norm_heads(x, weights, eps)
        return found

    def rms_norm_heads_backward(self, grad: Tensor, x: Tensor, weights: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the gradients of ``x`` and ``weights``."""
        found: tuple[Tensor, Tensor] = self.ops._rms_norm_heads_backward(grad, x, weights, rstd)
        return found

    def matmul_(self, out: Tensor, a: Tensor, b: Tensor, *, beta: float = 0.0, alpha: float = 1.0) -> Tensor:
        """Computes ``out = beta * out + alpha * a @ b`` in ``out``'s dtype; ``beta = 0`` does not read ``out``."""
        if out.dtype == a.dtype:
            if beta == 0.0 and alpha == 1.0:
                return torch.mm(a, b, out=out)
            return torch.addmm(out, a, b, beta=beta, alpha=alpha, out=out)
        # Outside CUDA torch has no GEMM from 16-bit operands to float32: widen one tile of products at a time.
        for begin in range(0, len(out), _TILE_ROWS):
            tile = out[begin : begin + _TILE_ROWS]
            product = torch.mm(a[begin : begin + _TILE_ROWS], b).to(out.dtype)
            tile.copy_(product.mul_(alpha) if beta == 0.0 else product.mul_(alpha).add_(tile, alpha=beta))
        return out

    def add_column_sum_(self, out: Tensor, x: Tensor, scale: float) -> None:
        """Computes ``out[v] += scale * sum_c x[c, v]`` in ``out``'s dtype."""
        out.add_(x.sum(0, dtype=out.dtype), alpha=scale)

    def scaled(
        self, grads: Sequence[Tensor | None], by: Tensor, dtypes: Sequence[torch.dtype | None]
    ) -> list[Tensor | None]:
        """Returns ``grads[i] * by`` as ``dtypes[i]``; ``by`` is 0-d with at least 32 bits. Never in place."""
        return [None if x is None else self._scaled(x, by, d) for x, d in zip(grads, dtypes, strict=True)]

    def _scaled(self, x: Tensor, by: Tensor, dtype: torch.dtype | None) -> Tensor:
        wide = x if x.dtype.itemsize > 2 else x.to(by.dtype)  # a loss scale of 65536 overflows float16
        return (wide * by).to(dtype)


class CpuBackend(Backend):
    """The CPU.

    Args:
        native_loss: If False, use the chunk loop of :mod:`mtp_ext.ops.loss.loop.row_loop` instead of the native call.
        fast_bfloat16: Compute bfloat16 logits with a bfloat16 GEMM; by default if the CPU has native support.
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

    def is_one(self, by: Tensor) -> bool:
        """Returns True if ``by`` is known to be 1, as the gradient of a loss that is not scaled."""
        return can_read(by) and by.item() == 1.0

    def scaled(
        self, grads: Sequence[Tensor | None], by: Tensor, dtypes: Sequence[torch.dtype | None]
    ) -> list[Tensor | None]:
        if self.is_one(by):
            return [x if x is None or x.dtype == d else x.to(d) for x, d in zip(grads, dtypes, strict=True)]
        return super().scaled(grads, by, dtypes)


class MetaBackend(Backend):
    """Tensors without data: the shapes of the CPU's native call."""

    native_loss = True

    def __init__(self) -> None:
        super().__init__("meta")
        self.is_built = True


class CudaBackend(Backend):
    """CUDA: no syncs, GEMMs from 16-bit operands to float32, and the CUDA-only kernels.

    Args:
        is_built: Overrides whether the build has CUDA kernels.
    """

    def __init__(self, *, is_built: bool | None = None) -> None:
        super().__init__("cuda")
        self.is_built = self.is_built if is_built is None else is_built
        self.has_kernels = self.is_built

    def shard_logits_dtype(self, compute_dtype: torch.dtype) -> torch.dtype:
        # Float32 operands would do without tensor cores. float16 gradients of a shard have no scale against underflow.
        return compute_dtype if compute_dtype == torch.bfloat16 else super().shard_logits_dtype(compute_dtype)

    def row_stride(self, columns: int, itemsize: int) -> int:
        width = max(1, 16 // itemsize)  # rows are 16-byte aligned
        return -(-max(1, columns) // width) * width  # of an empty shard of the vocabulary, too

    def matmul_(self, out: Tensor, a: Tensor, b: Tensor, *, beta: float = 0.0, alpha: float = 1.0) -> Tensor:
        if out.dtype == a.dtype:
            return super().matmul_(out, a, b, beta=beta, alpha=alpha)
        return self.matmul_wide_(out, a, b, beta, alpha)

    def matmul_wide_(self, out: Tensor, a: Tensor, b: Tensor, beta: float, alpha: float) -> Tensor:
        """:meth:`matmul_` from 16-bit operands to a float32 result."""
        if beta == 0.0 and alpha == 1.0:
            return torch.mm(a, b, out_dtype=out.dtype, out=out)
        return torch.addmm(out, a, b, out_dtype=out.dtype, beta=beta, alpha=alpha, out=out)

    def add_column_sum_(self, out: Tensor, x: Tensor, scale: float) -> None:
        if out.dtype == torch.float32 and scale == 1.0:
            self.ops._column_sum_(x, out, True)
        else:
            super().add_column_sum_(out, x, scale)

    def _scaled(self, x: Tensor, by: Tensor, dtype: torch.dtype | None) -> Tensor:
        if torch.float64 in (x.dtype, dtype):  # the kernel does not support float64
            return super()._scaled(x, by, dtype)
        out = torch.empty(x.shape, dtype=dtype, device=x.device)
        self.ops._scale_into_(x.contiguous(), by.float().reshape(1), out)
        return out


def can_read(x: Tensor) -> bool:
    """Returns True if the host can read ``x`` without a sync: on the CPU, and neither traced, nor fake, nor batched."""
    if not backend_of(x.device).sees_values or torch.compiler.is_compiling() or type(x) not in _PLAIN_TYPES:
        return False
    if is_written_down():
        return False
    functorch = torch._C._functorch
    return not functorch.is_functorch_wrapped_tensor(x) and not functorch.is_legacy_batchedtensor(x)


@functools.cache
def has_fast_bfloat16_gemm() -> bool:
    """Returns True if this CPU multiplies bfloat16 natively; otherwise torch's bfloat16 GEMM is 10-100 times slower.

    False under ``MTP_EXT_CPU_CAPABILITY=avx2`` (or ``plain``), as on a CPU without AVX-512.
    """
    if platform.machine() not in ("x86_64", "AMD64") or _C.build_info()["cpu_capability"] != "avx512":
        return False
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


_BACKENDS: dict[str, Backend] = {"cpu": CpuBackend(), "cuda": CudaBackend(), "meta": MetaBackend()}
forced: Backend | None = None


def backend_of(device: torch.device) -> Backend:
    """Returns the backend of a device."""
    return forced or _BACKENDS.get(device.type) or Backend(device.type)


@contextmanager
def use_backend(backend: Backend) -> Iterator[None]:
    """Uses ``backend`` for every device, so that tests can run one device's path on another."""
    global forced
    before, forced = forced, backend
    try:
        yield
    finally:
        forced = before
