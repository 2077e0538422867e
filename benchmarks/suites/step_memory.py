"""Peak memory of one training step against the number of heads, for the model's three schedules.

Measures the paper's argument: with plain torch every head's logits are alive until backward; in the sequential order,
with the row-chunked loss, only the heads' own parameters and gradients grow with ``n``.
``python -m benchmarks.suites.step_memory --device cpu --rounds 3 --out benchmarks/results/FILE.json``
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.harness.runner import Case, main
from mtp_ext.nn import MTPConfig, MTPModel

TRUNK_LAYERS = 2


def step(model: MTPModel, tokens: Tensor, labels: Tensor, schedule: str) -> Tensor:
    model.zero_grad(set_to_none=True)
    loss: Tensor = model(tokens, labels, schedule=schedule).loss
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach()


def cases(device: str, quick: bool) -> Iterator[Case]:
    batch, seq_len, width, vocab_size = (1, 32, 32, 500) if quick else (4, 256, 256, 32000)
    for n_future in (1, 2) if quick else (1, 2, 4, 8):
        torch.manual_seed(0)
        config = MTPConfig(
            vocab_size=vocab_size,
            d_model=width,
            n_layers=TRUNK_LAYERS + n_future,
            n_attn_heads=4,
            n_future=n_future,
            max_seq_len=seq_len,
        )
        model = MTPModel(config).to(device)
        labels = torch.randint(vocab_size, (batch, seq_len + n_future), device=device)
        shape = {"n": n_future, "B": batch, "S": seq_len, "D": width, "V": vocab_size}
        for schedule in ("sequential", "joint", "autograd"):
            yield Case("step_memory", schedule, shape, partial(step, model, labels[:, :seq_len], labels, schedule))


if __name__ == "__main__":
    main(cases, baseline="autograd", description=__doc__)
