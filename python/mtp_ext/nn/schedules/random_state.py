"""Saves and restores the state of the random generators."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RandomState:
    """The state of torch's global generators of the CPU and one device."""

    cpu: Tensor
    cuda: Tensor | None
    device: torch.device

    @staticmethod
    def of(device: torch.device) -> RandomState:
        """Captures the current state."""
        cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return RandomState(torch.get_rng_state(), cuda, device)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Repeats the same random numbers within the context; afterwards the generators continue unaffected."""
        with torch.random.fork_rng([self.device] if self.cuda is not None else []):
            torch.set_rng_state(self.cpu)
            if self.cuda is not None:
                torch.cuda.set_rng_state(self.cuda, self.device)
            yield
