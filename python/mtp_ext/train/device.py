"""The device and the precision of a model's computation."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mtp_ext.ops.common.backend import has_fast_bfloat16_gemm


@dataclass(frozen=True)
class Compute:
    """A device, and whether matrix products run in bfloat16 on it.

    Attributes:
        device: The device.
        bfloat16: Whether `autocast` computes in bfloat16; parameters stay float32.
    """

    device: torch.device
    bfloat16: bool

    def autocast(self) -> torch.autocast:
        """Returns the autocast context of a forward pass."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bfloat16)

    def describe(self) -> str:
        """Describes device and precision for display."""
        if self.device.type == "cuda":
            name = torch.cuda.get_device_name(self.device)
        else:
            name = f"CPU, {torch.get_num_threads()} threads"
        return f"{name}, {'bfloat16 autocast' if self.bfloat16 else 'float32'}"


def choose_compute(device: str = "auto", precision: str = "auto") -> Compute:
    """Resolves the device and precision options.

    Args:
        device: A torch device, or "auto": a GPU if there is one.
        precision: "float32", "bfloat16", or "auto": bfloat16 if the hardware supports it.
    Raises:
        ValueError: The device does not exist.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device must be cpu, cuda, cuda:<number> or auto, got {device!r}") from None
    if chosen.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu, cuda, cuda:<number> or auto, got {device!r}")
    if chosen.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (chosen.index or 0) >= count:
            raise ValueError(f"device {device!r} does not exist: torch {torch.__version__} sees {count} GPUs")
    return Compute(chosen, native_bfloat16(chosen) if precision == "auto" else precision == "bfloat16")


def native_bfloat16(device: torch.device) -> bool:
    """Returns True if the hardware multiplies bfloat16 matrices; otherwise bfloat16 is far slower than float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return has_fast_bfloat16_gemm()
