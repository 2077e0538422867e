"""Time and peak memory of one training step against the number of heads, for every architecture and schedule.

Measures the claims of the paper's order: with independent heads, memory is flat in ``n`` except for the heads'
parameters; each chained head adds ``B S D`` if recomputed, else one layer's activations; plain autograd adds a head's
logits, ``B S V``. The order costs no time compared with plain autograd.
``python -m benchmarks.suites.variants --device cpu --rounds 3 --out benchmarks/results/FILE.json``
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.harness.runner import Case, main
from mtp_ext.nn import MTPConfig, MTPModel
from mtp_ext.nn.variants import VARIANTS

TRUNK_LAYERS = 2
PAPER_VARIANTS = ("parallel", "linear", "replicated", "causal", "anticausal")
RECOMPUTE = "sequential, recompute"


def config_of(variant: str, n_future: int, shape: dict[str, int]) -> MTPConfig:
    """Returns a configuration with two trunk layers below the heads of a variant."""
    return MTPConfig(
        vocab_size=shape["V"],
        d_model=shape["D"],
        n_layers=TRUNK_LAYERS + VARIANTS[variant].n_layers(n_future),
        n_attn_heads=4,
        n_future=n_future,
        variant=variant,
        max_seq_len=shape["S"],
    )


class Step:
    """Runs forward and backward of a model, built on first use and shared by all schedules of its group."""

    def __init__(self, config: MTPConfig, batch: int, device: str) -> None:
        self.config, self.batch, self.device = config, batch, device
        self._made: tuple[MTPModel, Tensor] | None = None

    def __call__(self, impl: str) -> Tensor:
        if self._made is None:
            torch.manual_seed(0)
            size = (self.batch, self.config.max_seq_len + self.config.n_future)
            labels = torch.randint(self.config.vocab_size, size, device=self.device)
            self._made = MTPModel(self.config).to(self.device), labels
        model, labels = self._made
        model.heads.recompute = impl == RECOMPUTE
        model.zero_grad(set_to_none=True)
        result = model(labels[:, : self.config.max_seq_len], labels, schedule=impl.split(",")[0])
        loss: Tensor = result.loss
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()


def cases(device: str, quick: bool) -> Iterator[Case]:
    batch, shape = (1, {"S": 32, "D": 32, "V": 500}) if quick else (4, {"S": 256, "D": 128, "V": 8192})
    for variant in ("parallel", "causal") if quick else PAPER_VARIANTS:
        for n_future in (2,) if quick else (1, 2, 4, 8, 16):
            step = Step(config_of(variant, n_future, shape), batch, device)
            impls = ["sequential", "joint", "autograd"]
            if VARIANTS[variant].order != "independent":
                impls.insert(1, RECOMPUTE)
            labels: dict[str, int | str] = {"variant": variant, "n": n_future, "B": batch, **shape}
            for impl in impls:
                yield Case("variants", impl, labels, partial(step, impl))


if __name__ == "__main__":
    main(cases, baseline="autograd", description=__doc__)
