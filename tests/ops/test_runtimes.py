"""The losses where torch has no values or other defaults: fake and meta tensors, default devices, threads, numpy."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode

from mtp_ext.nn import MTPConfig, MTPModel
from mtp_ext.nn.variants import VARIANTS
from mtp_ext.ops import linear_cross_entropy, multi_token_cross_entropy
from mtp_ext.ops.common.backend import CpuBackend, use_backend
from tests.nn.conftest import ALL_VARIANTS

ROWS, WIDTH, VOCAB, N = 12, 8, 17, 2
SCHEDULES = ("sequential", "joint", "autograd")


def leaves(device: str = "cpu") -> list[Tensor]:
    return [
        torch.randn(ROWS, WIDTH, device=device, requires_grad=True),
        torch.randn(VOCAB, WIDTH, device=device, requires_grad=True),
    ]


def make_model(variant: str = "parallel", trunk_layers: int = 2) -> MTPModel:
    n_layers = trunk_layers + VARIANTS[variant].n_layers(N)
    return MTPModel(MTPConfig(VOCAB, WIDTH, n_layers, 2, n_future=N, variant=variant))


@pytest.mark.parametrize("variant", ALL_VARIANTS)
def test_a_step_of_a_model_on_fake_tensors(variant: str) -> None:
    """What memory planners run."""
    with FakeTensorMode():
        model, labels = make_model(variant), torch.randint(VOCAB, (2, 8))
        documents = torch.zeros(2, 8, dtype=torch.int64)
        for schedule in SCHEDULES:
            model(labels[:, :6], labels, documents, schedule=schedule).loss.backward()
        assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())


@pytest.mark.parametrize("variant", ALL_VARIANTS)
def test_a_step_of_a_model_on_meta_tensors(variant: str) -> None:
    with torch.device("meta"):
        model = make_model(variant)
        labels = torch.randint(VOCAB, (2, 8))
    for schedule in SCHEDULES:
        loss = model(labels[:, :6], labels, schedule=schedule).loss
        loss.backward()
        assert loss.is_meta and loss.shape == ()


@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, {"z_loss": 0.1}, {"return_lse": True}], ids=str)
def test_losses_on_meta_tensors(options: dict[str, Any]) -> None:
    hidden, weight = leaves("meta")
    out = linear_cross_entropy(hidden, weight, torch.zeros(ROWS, dtype=torch.int64, device="meta"), **options)
    (out.sum() if isinstance(out, Tensor) else out[0]).backward()
    assert hidden.grad is not None and hidden.grad.is_meta and hidden.grad.shape == hidden.shape


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_default_device_is_not_where_things_are_made(schedule: str) -> None:
    model, labels = make_model(), torch.randint(VOCAB, (2, 8))
    documents = torch.arange(8).div(3, rounding_mode="floor").expand(2, -1)
    expected = model(labels[:, :6], labels, documents, schedule=schedule).loss
    with torch.device("meta"):
        found = model(labels[:, :6], labels, documents, schedule=schedule).loss
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    "options",
    [{}, {"reduction": "none"}, {"label_smoothing": 0.1}, {"class_weights": True, "bias": True}, {"chunk_rows": 5}],
    ids=str,
)
@pytest.mark.parametrize("native", [True, False], ids=["native", "row loop"])
def test_a_default_device_of_a_loss(options: dict[str, Any], native: bool) -> None:
    made = options | {name: torch.rand(VOCAB) for name in ("class_weights", "bias") if name in options}
    hidden, weight = leaves()
    targets = torch.randint(VOCAB, (ROWS,))
    with use_backend(CpuBackend(native_loss=native)):
        expected = linear_cross_entropy(hidden, weight, targets, **made)
        with torch.device("meta"):
            found = linear_cross_entropy(hidden, weight, targets, **made)
    assert isinstance(found, Tensor) and isinstance(expected, Tensor) and torch.equal(found, expected)


@pytest.mark.parametrize("native", [True, False], ids=["native", "row loop"])
def test_threads_with_different_vocabularies(native: bool) -> None:
    """The workspace is one for the process; each thread checks its result against torch's."""
    failures: list[BaseException] = []

    def work(vocab: int) -> None:
        try:
            g = torch.Generator().manual_seed(vocab)
            for _ in range(40):
                hidden = torch.randn(30, WIDTH, generator=g, requires_grad=True)
                weight = torch.randn(vocab, WIDTH, generator=g, requires_grad=True)
                targets = torch.randint(vocab, (30,), generator=g)
                loss = linear_cross_entropy(hidden, weight, targets, z_loss=1e-3)
                logits = hidden @ weight.t()
                expected = (
                    torch.nn.functional.cross_entropy(logits, targets) + 1e-3 * logits.logsumexp(1).square().mean()
                )
                found = torch.autograd.grad(loss, (hidden, weight))  # type: ignore[arg-type]
                for a, b in zip(found, torch.autograd.grad(expected, (hidden, weight)), strict=True):
                    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        except BaseException as error:
            failures.append(error)

    with use_backend(CpuBackend(native_loss=native)):
        threads = [threading.Thread(target=work, args=(17 + 31 * i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert failures == []


NUMPY = {
    "label_smoothing": np.float32(0.5),
    "z_loss": np.float64(0.25),
    "softcap": np.float32(4.0),
    "logit_scale": np.int64(2),
    "ignore_index": np.int64(3),
    "chunk_rows": np.int32(5),
    "workspace_bytes": np.int64(1000),
    "max_valid": np.int64(ROWS),
}


@pytest.mark.parametrize("name", NUMPY)
def test_numbers_of_numpy(name: str) -> None:
    hidden, weight = leaves()
    targets = torch.randint(VOCAB, (ROWS,))
    found, expected = (
        linear_cross_entropy(hidden, weight, targets, **{name: x}) for x in (NUMPY[name], NUMPY[name].item())
    )
    assert isinstance(found, Tensor) and isinstance(expected, Tensor) and torch.equal(found, expected)


def test_numbers_of_numpy_in_heads() -> None:
    hidden, labels = torch.randn(N, 2, 6, WIDTH), torch.randint(VOCAB, (2, 8))
    weight = torch.randn(VOCAB, WIDTH)
    found, expected = (
        multi_token_cross_entropy(hidden, weight, labels, normalizer=x, max_valid=[y, y], head_weights=[x, x]).loss
        for x, y in ((np.float32(7), np.int64(20)), (7.0, 20))
    )
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ["ignore_index", "chunk_rows", "workspace_bytes"])
def test_integers_beyond_64_bits(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must fit in 64 bits"):
        linear_cross_entropy(*leaves(), torch.randint(VOCAB, (ROWS,)), **{name: 2**70})


@pytest.mark.parametrize("name", ["hidden", "weight"])
def test_sparse_tensors(name: str) -> None:
    made = dict(zip(("hidden", "weight"), leaves(), strict=True))
    made[name] = made[name].detach().to_sparse()
    with pytest.raises(TypeError, match=f"{name} must be a dense tensor .*to_dense"):
        linear_cross_entropy(**made, targets=torch.randint(VOCAB, (ROWS,)))


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["sequential", "joint"])
@pytest.mark.parametrize("variant", ["parallel", "causal", "shared"])
def test_compiled_models_take_changing_lengths(variant: str, schedule: str) -> None:
    """The first two lengths are compiled, the second for any length; those that follow run what is there."""
    torch._dynamo.reset()
    counters.clear()
    model, graphs = make_model(variant, trunk_layers=1), []
    compiled = torch.compile(model, backend="aot_eager")
    for length in (6, 5, 9, 7):
        labels = torch.randint(VOCAB, (2, length + N))
        grads = []
        for each in (model, compiled):
            model.zero_grad()
            each(labels[:, :length], labels, schedule=schedule).loss.backward()
            grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] > 0 and graphs[1] == graphs[2] == graphs[3]


@pytest.mark.parametrize("schedule", ["sequential", "joint"])
def test_a_bound_that_is_too_small_is_an_error_in_every_variant(schedule: str) -> None:
    labels = torch.randint(VOCAB, (2, 8))
    for variant in ALL_VARIANTS:
        with pytest.raises(ValueError, match="max_valid must be at least the number of targets"):
            make_model(variant)(labels[:, :6], labels, schedule=schedule, max_valid=1)
