"""Models put together from a user's own modules: any trunk, any heads, any order, any schedule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtp_ext.nn import ComposedModel, Head, MTPConfig
from mtp_ext.nn.transformer.layers import Block
from mtp_ext.nn.transformer.trunk import Trunk
from tests.nn.conftest import SCHEDULES, VOCAB_SIZE

Make = Callable[..., Any]
Error = Callable[[Tensor, Tensor], float]
WIDTH = 8


class OwnTrunk(nn.Module):
    """An embedding and a running mean over the past, with a dictionary-free interface of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCAB_SIZE, WIDTH)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        return x.cumsum(1) / torch.arange(1, tokens.shape[1] + 1, dtype=x.dtype)[:, None]


class OwnHead(nn.Module):
    """A nonlinear head with a buffer, and without our interface."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(float(k)))
        self.inner = nn.Sequential(nn.Linear(WIDTH, 12), nn.Tanh(), nn.Linear(12, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.inner(x)


def build(variant: str, heads: Any, n_future: int | None = None, **keywords: Any) -> ComposedModel:
    unembed = nn.Linear(WIDTH, VOCAB_SIZE, bias=False)
    return ComposedModel(OwnTrunk(), heads, unembed, variant=variant, n_future=n_future, **keywords).double()


def chain(model: ComposedModel, variant: str, z: Tensor) -> dict[int, Tensor]:
    blocks = {k: model.heads.head(k).block for k in (1, 2, 3)}
    outputs: dict[int, Tensor] = {}
    for k in (3, 2, 1) if variant == "anticausal" else (1, 2, 3):
        before = {"causal": k - 1, "anticausal": k + 1}.get(variant)
        outputs[k] = blocks[k](outputs.get(before, z))
    return outputs


@pytest.mark.parametrize("as_function", [False, True])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("variant", ["parallel", "causal", "anticausal"])
def test_own_trunk_and_heads_in_any_order(
    variant: str, schedule: str, as_function: bool, make_batch: Make, relative_error: Error
) -> None:
    model = build(variant, OwnHead, 3) if as_function else build(variant, [OwnHead(k) for k in (1, 2, 3)])
    tokens, labels = make_batch(3)
    seq_len = tokens.shape[1]
    expected = torch.zeros((), dtype=torch.float64)
    for k, state in chain(model, variant, model.trunk(tokens)).items():
        logits = model.unembed(model.heads.head(k).norm(state))
        expected = expected + F.cross_entropy(logits.flatten(0, 1), labels[:, k : k + seq_len].flatten())
    expected.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    result = model(tokens, labels, schedule=schedule)
    result.loss.backward()
    assert relative_error(result.loss, expected) < 1e-12
    for name, p in model.named_parameters():
        assert relative_error(p.grad, grads[name]) < 1e-12, name
    assert model(tokens).shape == (*tokens.shape, VOCAB_SIZE)
    assert torch.equal(model.all_logits(tokens)[0], model(tokens))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_own_heads_of_different_kinds_with_documents(schedule: str, make_batch: Make, relative_error: Error) -> None:
    """Our trunk and layers beside modules that know nothing of attention."""
    config = MTPConfig(vocab_size=VOCAB_SIZE, d_model=WIDTH, n_layers=4, n_attn_heads=2, n_future=2)
    embed = nn.Embedding(VOCAB_SIZE, WIDTH)
    trunk = Trunk(config, embed)
    trunk.embed = embed
    heads = [Block(config, 2), Head(nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)), nn.Identity()]
    model = ComposedModel(trunk, heads, embed, variant="causal").double()
    tokens, labels = make_batch(3)
    ids = (torch.arange(labels.shape[1]) // 5).expand_as(labels)
    grads: dict[str, dict[str, Tensor]] = {}
    for name in ("autograd", schedule):
        model.zero_grad()
        model(tokens, labels, ids, schedule=name).loss.backward()
        grads[name] = {n: p.grad for n, p in model.named_parameters()}
    for name, grad in grads[schedule].items():
        assert relative_error(grad, grads["autograd"][name]) < 1e-12, name


def test_softcap_and_own_unembeddings(make_batch: Make, relative_error: Error) -> None:
    unembed = nn.Module()
    unembed.weight = nn.Parameter(torch.randn(2, VOCAB_SIZE, WIDTH))
    model = ComposedModel(OwnTrunk(), OwnHead, unembed, n_future=2, softcap=2.0).double()
    tokens, labels = make_batch(2)
    logits = model.all_logits(tokens)
    assert logits.abs().amax() < 2.0
    expected = sum(F.cross_entropy(logits[k - 1].flatten(0, 1), labels[:, k : k + 12].flatten()) for k in (1, 2))
    for schedule in SCHEDULES:
        assert relative_error(model(tokens, labels, schedule=schedule).loss, expected) < 1e-12


def test_tied_by_the_user(make_batch: Make) -> None:
    trunk = OwnTrunk()
    model = ComposedModel(trunk, OwnHead, trunk.table, n_future=2)
    model(*make_batch(2)).loss.backward()
    assert "unembed.weight" in model.state_dict() and trunk.table.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"heads": []}, ValueError, "heads must hold at least one head"),
        ({"heads": OwnHead}, ValueError, "n_future must be given where heads is a function"),
        ({"heads": [OwnHead(1)], "n_future": 2}, ValueError, "heads must hold n_future=2 modules, got 1"),
        ({"heads": 3}, TypeError, "heads must be a list of modules or a function of k, got int 3"),
        ({"heads": [OwnHead(1), "x"]}, TypeError, "heads must be modules, got str 'x' for head 2"),
        ({"heads": [OwnHead(1)], "variant": "serial"}, ValueError, "variant must be one of parallel"),
        ({"heads": [OwnHead(1)], "unembed": nn.Identity()}, TypeError, "unembed must have a weight"),
    ],
)
def test_errors_name_the_argument(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    keywords = {"unembed": nn.Linear(WIDTH, VOCAB_SIZE)} | arguments
    with pytest.raises(error, match=message):
        ComposedModel(OwnTrunk(), keywords.pop("heads"), keywords.pop("unembed"), **keywords)


def test_one_module_for_all_heads_is_refused() -> None:
    """Repeating a block object would share the heads' weights unasked."""
    head = OwnHead(1)
    with pytest.raises(ValueError, match="got one object twice"):
        build("parallel", [head] * 3)
    with pytest.raises(ValueError, match="got one object twice"):
        build("parallel", lambda k: head, 3)


def test_a_trunk_without_documents_does_not_take_them(make_batch: Make) -> None:
    tokens, labels = make_batch(2)
    with pytest.raises(ValueError, match="document_ids must be None: the trunk does not take them"):
        build("parallel", OwnHead, 2)(tokens, labels, torch.zeros_like(labels))


def test_a_trunk_of_the_wrong_width_is_named(make_batch: Make) -> None:
    model = ComposedModel(nn.Embedding(VOCAB_SIZE, 5), OwnHead, nn.Linear(WIDTH, VOCAB_SIZE), n_future=2)
    with pytest.raises(ValueError, match=r"trunk must give \[B, S, D\] = \[2, 12, 8\], got float32 \[2, 12, 5\]"):
        model(*make_batch(2))
