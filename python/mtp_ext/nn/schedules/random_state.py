"""Random numbers that can be drawn again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RandomState:
    """The state of torch's global generators of the CPU and of one device."""

    cpu: Tensor
    cuda: Tensor | None
    device: torch.device

    @staticmethod
    def of(device: torch.device) -> RandomState:
        """The state now."""
        cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return RandomState(torch.get_rng_state(), cuda, device)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Within it the same numbers come again; after it, generation goes on as if it had not been."""
        with torch.random.fork_rng([self.device] if self.cuda is not None else []):
            torch.set_rng_state(self.cpu)
            if self.cuda is not None:
                torch.cuda.set_rng_state(self.cuda, self.device)
            yield
