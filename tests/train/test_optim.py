"""Which parameter goes to which optimiser, with what decay and rate."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from mtp_ext.nn import MTPConfig, MTPModel
from mtp_ext.train.config import OptimConfig
from mtp_ext.train.muon import Muon
from mtp_ext.train.optim import Optimizers


def model(*, tied: bool = False) -> MTPModel:
    return MTPModel(MTPConfig(40, 16, 3, 2, n_future=2, tie_embeddings=tied, max_seq_len=16))


def groups(optimizers: Optimizers) -> list[tuple[type, float, set[int]]]:
    """Optimiser, weight decay and parameters of every group."""
    return [
        (type(optimizer), group["weight_decay"], {id(p) for p in group["params"]})
        for optimizer in optimizers._optimizers
        for group in optimizer.param_groups
    ]


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("tied", [False, True])
def test_every_parameter_is_optimised_once(name: str, tied: bool) -> None:
    net = model(tied=tied)
    found = groups(Optimizers(net, OptimConfig(name=name)))  # type: ignore[arg-type]
    ids = [i for _, _, members in found for i in members]
    assert sorted(ids) == sorted(id(p) for p in net.parameters())


def test_norms_do_not_decay_and_matrices_do() -> None:
    net = model()
    for _, decay, members in groups(Optimizers(net, OptimConfig(weight_decay=0.2))):
        shapes = {p.ndim for p in net.parameters() if id(p) in members}
        assert shapes == ({1} if decay == 0.0 else {2})


def test_muon_takes_the_layers_and_leaves_the_vocabulary() -> None:
    net = model()
    (muon,) = (members for kind, _, members in groups(Optimizers(net, OptimConfig(name="muon"))) if kind is Muon)
    names = {name for name, p in net.named_parameters() if id(p) in muon}
    assert names == {
        f"{layer}.{matrix}.weight"
        for layer in ("trunk.layers.0", "heads.0.block", "heads.1.block")
        for matrix in ("attention.qkv", "attention.out", "ff.gate_up", "ff.down")
    }


def test_the_factor_scales_every_peak() -> None:
    optimizers = Optimizers(model(), OptimConfig(name="muon", lr=0.5, muon_lr=0.25))
    optimizers.step(0.5)
    rates = {type(o): {g["lr"] for g in o.param_groups} for o in optimizers._optimizers}
    assert rates == {torch.optim.AdamW: {0.25}, Muon: {0.125}}


def test_clipping_returns_the_norm_before_and_limits_the_one_after() -> None:
    net = model()
    optimizers = Optimizers(net, OptimConfig(clip_norm=0.5))
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    expected = sum(p.numel() for p in net.parameters()) ** 0.5
    assert float(optimizers.clip_gradients()) == pytest.approx(expected, rel=1e-6)
    after = torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None]).norm()
    assert float(after) == pytest.approx(0.5, rel=1e-5)


def test_no_clipping_leaves_the_gradient_alone() -> None:
    net = model()
    for p in net.parameters():
        p.grad = torch.full_like(p, 100.0)
    Optimizers(net, OptimConfig(clip_norm=0.0)).clip_gradients()
    assert all(p.grad is not None and (p.grad == 100.0).all() for p in net.parameters())


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_loading_takes_the_moments_and_keeps_the_configuration(name: str, tmp_path: Path) -> None:
    net = model()
    config = OptimConfig(name=name)  # type: ignore[arg-type]
    first = Optimizers(net, config)
    for p in net.parameters():
        p.grad = torch.randn_like(p)
    first.step(1.0)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = Optimizers(net, dataclasses.replace(config, lr=7.0, muon_lr=7.0, weight_decay=0.7))
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for before, after in zip(first._optimizers, second._optimizers, strict=True):
        assert {g["lr"] for g in after.param_groups} == {7.0}
        assert {g["weight_decay"] for g in after.param_groups} <= {0.7, 0.0}
        for parameter, state in before.state.items():
            for key, value in state.items():
                assert torch.equal(torch.as_tensor(after.state[parameter][key]), torch.as_tensor(value)), key
