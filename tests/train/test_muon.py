"""Muon against torch's own, which iterates in bfloat16, and against what it is meant to compute."""

from __future__ import annotations

import pytest
import torch

from mtp_ext.train.muon import Muon, orthogonalize


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 48, 16), (2, 16, 40), (1, 7, 1)])
def test_singular_values_end_near_one(shape: tuple[int, int, int]) -> None:
    singular = torch.linalg.svdvals(orthogonalize(torch.randn(shape, dtype=torch.float64), torch.float64))
    assert singular.min() > 0.3
    assert singular.max() < 1.3


def test_directions_are_kept() -> None:
    """The result is U f(S) V^T with the same U and V: it commutes with the symmetric part of its input."""
    x = torch.randn(1, 12, 8, dtype=torch.float64)
    product = x[0].T @ orthogonalize(x, torch.float64)[0]
    assert torch.allclose(product, product.T, atol=1e-12)
    assert (torch.linalg.eigvalsh(product) > 0).all()


def test_a_batch_is_its_matrices() -> None:
    x = torch.randn(3, 8, 20, dtype=torch.float64)
    one_by_one = torch.cat([orthogonalize(m[None], torch.float64) for m in x])
    assert torch.allclose(orthogonalize(x, torch.float64), one_by_one, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(16, 16), (64, 16), (16, 64)])
def test_steps_equal_torch_muon_to_its_bfloat16(shape: tuple[int, int]) -> None:
    start = torch.randn(shape)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    optimizers = [
        Muon([ours], lr=0.1, momentum=0.9, weight_decay=0.1),
        torch.optim.Muon([theirs], lr=0.1, momentum=0.9, weight_decay=0.1),
    ]
    for _ in range(3):
        grad = torch.randn(shape)
        for parameter, optimizer in zip((ours, theirs), optimizers, strict=True):
            parameter.grad = grad.clone()
            optimizer.step()
    moved = (theirs - start).norm()
    assert (ours - theirs).norm() < 0.03 * moved  # five iterations in bfloat16 (eps 0.8 %), three steps
    assert moved > 0.5


def test_a_zero_gradient_moves_nothing_but_the_decay() -> None:
    parameter = torch.nn.Parameter(torch.ones(4, 4))
    parameter.grad = torch.zeros(4, 4)
    Muon([parameter], lr=0.1, weight_decay=0.5).step()
    assert torch.equal(parameter.detach(), torch.full((4, 4), 0.95))


def test_vectors_are_refused() -> None:
    with pytest.raises(ValueError, match=r"Muon takes matrices, got a parameter of shape \(4,\)"):
        Muon([torch.nn.Parameter(torch.ones(4))])
