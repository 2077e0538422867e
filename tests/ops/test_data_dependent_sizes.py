"""Compiled losses of ``hidden[mask], targets[mask]``: numbers of rows that are known only when the graph runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from mtp_ext.ops import linear_cross_entropy, multi_token_cross_entropy
from mtp_ext.ops.loss.arguments import LossCall, Needs
from mtp_ext.ops.loss.operators import arguments

ROWS, WIDTH, VOCAB = 12, 8, 17


@pytest.fixture(autouse=True)
def captured() -> Iterator[None]:
    torch._dynamo.reset()
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        yield


Loss = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Any]
# Of hidden states, unembedding, targets, and two masks that choose the same number of rows.
LOSSES: dict[str, Loss] = {
    "mean": lambda h, w, t, m, n: linear_cross_entropy(h[m], w, t[m]),
    "two masks": lambda h, w, t, m, n: linear_cross_entropy(h[m], w, t[n]),
    "indices": lambda h, w, t, m, n: linear_cross_entropy(h[m.nonzero()[:, 0]], w, t[m.nonzero()[:, 0]]),
    "rows": lambda h, w, t, m, n: linear_cross_entropy(h[m], w, t[n], reduction="none").sin().sum(),  # type: ignore[union-attr]
    "options": lambda h, w, t, m, n: linear_cross_entropy(
        h[m], w, t[n], token_weights=1.0 + t[n], z_loss=0.1, return_lse=True
    )[0],
    "heads": lambda h, w, t, m, n: multi_token_cross_entropy([h[m][None], h[n][None]], w, t[m][None]).loss,
}


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_changing_numbers_of_rows(loss: Loss, backend: str) -> None:
    weight = torch.randn(VOCAB, WIDTH, requires_grad=True)
    compiled = torch.compile(loss, fullgraph=True, backend=backend)
    for count in (5, 7, 0, 1, ROWS):
        hidden, targets = torch.randn(ROWS, WIDTH, requires_grad=True), torch.randint(VOCAB, (ROWS,))
        masks = [(torch.arange(ROWS) < count)[torch.randperm(ROWS)] for _ in range(2)]
        expected, found = (f(hidden, weight, targets, *masks) for f in (loss, compiled))
        torch.testing.assert_close(found, expected)
        right = torch.autograd.grad(expected, (hidden, weight))
        for ours, grad in zip(torch.autograd.grad(found, (hidden, weight)), right, strict=True):
            torch.testing.assert_close(ours, grad, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["two masks", "rows", "options", "heads"])
def test_numbers_that_differ_are_found_when_the_graph_runs(name: str) -> None:
    compiled = torch.compile(LOSSES[name], fullgraph=True, backend="aot_eager")
    made = torch.randn(ROWS, WIDTH), torch.randn(VOCAB, WIDTH), torch.randint(VOCAB, (ROWS,))
    with pytest.raises(RuntimeError, match="Runtime assertion failed"):
        compiled(*made, torch.arange(ROWS) < 5, torch.arange(ROWS) < 6)


@pytest.mark.parametrize("rows", [0, 5, ROWS + 1])
def test_a_raw_operator_counts_the_rows(rows: int) -> None:
    """A graph that checks nothing must not read or write outside of its tensors."""
    call = LossCall(torch.zeros(1, ROWS, dtype=torch.int64), ROWS, 1, 0, torch.float32)
    packed = arguments(call, torch.zeros(VOCAB, WIDTH), [torch.zeros(rows, WIDTH)], Needs(True, True, False))
    with pytest.raises(RuntimeError, match="hidden must hold 12 rows of 8 elements"):
        torch.ops.mtp_ext._multi_token_loss(*packed)
