"""The model shapes of the paper (Appendix M; docs call them by their nominal parameter count)."""

from __future__ import annotations

from typing import NamedTuple


class Shape(NamedTuple):
    """Width, transformer layers in all (trunk and heads), attention heads."""

    d_model: int
    n_layers: int
    n_attn_heads: int


PRESETS: dict[str, Shape] = {
    # Synthetic tasks.
    "1M": Shape(128, 5, 4),
    "3M": Shape(256, 4, 8),
    "10M": Shape(384, 6, 8),
    "30M": Shape(512, 10, 8),
    "100M": Shape(768, 14, 12),
    "300M": Shape(1024, 25, 16),
    "1B": Shape(1536, 36, 24),
    # Code models.
    "0.3B": Shape(1024, 18, 16),
    "0.6B": Shape(1280, 27, 20),
    "1.3B": Shape(2048, 24, 16),
    "3B": Shape(2560, 36, 20),
    "6.7B": Shape(4096, 32, 32),
    "13B": Shape(5120, 40, 40),
}
