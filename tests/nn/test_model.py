from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mtp_ext.nn import MTPConfig, MTPModel
from mtp_ext.nn.transformer import attention

Make = Callable[..., Any]


def ordinary_language_model(p: dict[str, Tensor], config: MTPConfig, tokens: Tensor, next_tokens: Tensor) -> Tensor:
    """The mean loss of a plain decoder by definition: all layers in a row, real arithmetic, full masks."""
    S, H, G, d = tokens.shape[1], config.n_attn_heads, config.kv_heads, config.head_dim
    layers = [f"trunk.layers.{i}." for i in range(config.n_trunk_layers)] + ["heads.0.block."]
    frequency = config.rope_theta ** (-torch.arange(0, d, 2).double() / d)
    angle = torch.arange(S).double()[:, None] * frequency

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + config.norm_eps).sqrt() * weight

    def turn(x: Tensor) -> Tensor:  # [B, h, S, d]
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.stack([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1).flatten(-2)

    x = p["embed.weight"][tokens]
    for name in layers:
        qkv = norm(x, p[name + "attention_norm.weight"]) @ p[name + "attention.qkv.weight"].T
        q, k, v = qkv.split([H * d, G * d, G * d], -1)
        q, k, v = (t.unflatten(-1, (-1, d)).transpose(1, 2) for t in (q, k, v))
        k, v = (t.repeat_interleave(H // G, dim=1) for t in (k, v))
        scores = turn(q) @ turn(k).mT / math.sqrt(d)
        scores = scores.masked_fill(~torch.ones(S, S, dtype=torch.bool).tril(), -math.inf)
        x = x + (scores.softmax(-1) @ v).transpose(1, 2).flatten(2) @ p[name + "attention.out.weight"].T
        gate, up = (norm(x, p[name + "ff_norm.weight"]) @ p[name + "ff.gate_up.weight"].T).chunk(2, -1)
        x = x + (gate * torch.sigmoid(gate) * up) @ p[name + "ff.down.weight"].T
    logits = norm(x, p["heads.0.norm.weight"]) @ p["unembed.weight"].T
    return F.cross_entropy(logits.flatten(0, 1), next_tokens.flatten())


@pytest.mark.parametrize("schedule", ["sequential", "joint", "autograd"])
def test_one_head_is_an_ordinary_language_model(
    schedule: str, make_model: Make, make_batch: Make, relative_error: Make
) -> None:
    model = make_model(1)
    tokens, labels = make_batch(1)
    p = {name: x.detach().clone().requires_grad_() for name, x in model.named_parameters()}
    expected = ordinary_language_model(p, model.config, tokens, labels[:, 1:])
    expected.backward()
    loss = model(tokens, labels, schedule=schedule).loss
    loss.backward()
    assert relative_error(loss, expected) < 1e-12
    for name, x in model.named_parameters():
        assert relative_error(x.grad, p[name].grad) < 1e-12, name


def test_logits(make_model: Make, make_batch: Make) -> None:
    model = make_model(3)
    tokens, labels = make_batch(3)
    logits = model.all_logits(tokens)
    assert logits.shape == (3, 2, 12, 37)
    torch.testing.assert_close(model(tokens), logits[0], rtol=1e-12, atol=1e-12)
    result = model(tokens, labels)
    for k in range(1, 4):
        loss = F.cross_entropy(logits[k - 1].flatten(0, 1), labels[:, k : k + 12].flatten())
        torch.testing.assert_close(result.head_loss[k - 1], loss, rtol=1e-12, atol=0)


def test_heads_differ(make_model: Make, make_batch: Make) -> None:
    """A block object that is repeated would make all heads one."""
    model = make_model(3)
    parameters = [list(model.heads.head(k).parameters()) for k in (1, 2, 3)]
    assert len({p.data_ptr() for ps in parameters for p in ps}) == 3 * len(parameters[0])
    logits = model.all_logits(make_batch(3)[0])
    assert not torch.allclose(logits[0], logits[1]) and not torch.allclose(logits[1], logits[2])


def test_parallel_heads_read_the_trunk(make_model: Make, make_batch: Make) -> None:
    """Perturbing head 2 changes the logits of head 2 alone."""
    model = make_model(3)
    tokens, _ = make_batch(3)
    before = model.all_logits(tokens)
    with torch.no_grad():
        model.heads.head(2).block.ff.down.weight.mul_(2)
    after = model.all_logits(tokens)
    assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [True, False, True]


def test_the_future_is_not_seen(make_model: Make, make_batch: Make) -> None:
    model = make_model(2)
    tokens, _ = make_batch(2)
    changed = tokens.clone()
    changed[:, 7] = (changed[:, 7] + 1) % 37
    before, after = model.all_logits(tokens), model.all_logits(changed)
    assert torch.equal(before[:, :, :7], after[:, :, :7])
    assert not torch.isclose(before[:, :, 7:], after[:, :, 7:]).all(-1).any()


@pytest.mark.parametrize("min_mean_segment", [1, 10**9], ids=["calls", "mask"])
def test_documents_do_not_leak(
    min_mean_segment: int, make_model: Make, make_batch: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Changing one document leaves the outputs of the others as they were, to the bit, in trunk and heads."""
    monkeypatch.setattr(attention, "_MIN_MEAN_SEGMENT", min_mean_segment)
    model = make_model(3)
    tokens, _ = make_batch(3)
    ids = torch.tensor([0] * 4 + [1] * 5 + [2] * 6).expand(2, -1)
    changed = tokens.clone()
    changed[0, 4:9] = (changed[0, 4:9] + 1) % 37
    for outputs in (lambda x: model.trunk(x, ids)[None], lambda x: model.all_logits(x, ids)):
        before, after = outputs(tokens), outputs(changed)
        assert torch.equal(before[:, 1], after[:, 1])
        assert torch.equal(before[:, 0, :4], after[:, 0, :4]) and torch.equal(before[:, 0, 9:], after[:, 0, 9:])
        assert not torch.isclose(before[:, 0, 4:9], after[:, 0, 4:9]).all(-1).any()
    without = model.all_logits(tokens)
    assert not torch.isclose(without[:, :, 9:], model.all_logits(tokens, ids)[:, :, 9:]).all(-1).any()


def test_a_packed_row_equals_its_documents_alone(make_model: Make, make_batch: Make) -> None:
    model = make_model(2)
    tokens, _ = make_batch(2)
    ids = torch.tensor([0] * 5 + [1] * 7).expand(2, -1)
    packed = model.all_logits(tokens, ids)
    alone = torch.cat([model.all_logits(tokens[:, :5]), model.all_logits(tokens[:, 5:])], dim=2)
    torch.testing.assert_close(packed, alone, rtol=1e-11, atol=1e-11)


def test_state_dict_names(make_model: Make) -> None:
    names = set(make_model(2).state_dict())
    assert {n.split(".")[0] for n in names} == {"embed", "trunk", "heads", "unembed"}
    assert {"embed.weight", "unembed.weight", "heads.0.norm.weight", "heads.1.block.attention.qkv.weight"} <= names
    shared = set(make_model(2, shared_final_norm=True).state_dict())
    assert "heads.norm.weight" in shared and "heads.0.norm.weight" not in shared


def test_state_dict_round_trip(make_model: Make, make_batch: Make) -> None:
    model, other = make_model(3), make_model(3)
    tokens, _ = make_batch(3)
    assert not torch.equal(model.all_logits(tokens), other.all_logits(tokens))
    other.load_state_dict(model.state_dict())
    assert torch.equal(model.all_logits(tokens), other.all_logits(tokens))


def test_a_missing_or_unexpected_head_weight_is_an_error(make_model: Make) -> None:
    state = make_model(3).state_dict()
    del state["heads.2.block.ff.down.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key.*heads\.2\.block\.ff\.down\.weight"):
        make_model(3).load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*heads\.3\."):
        make_model(3).load_state_dict(make_model(4).state_dict())


def test_a_tied_embedding_is_one_parameter(make_model: Make) -> None:
    model = make_model(2, tie_embeddings=True)
    assert model.unembed.weight is model.embed.weight
    assert "unembed.weight" not in dict(model.named_parameters())
    p = {name: x.detach() for name, x in model.state_dict().items()}
    assert torch.equal(p["unembed.weight"], p["embed.weight"])


@pytest.mark.parametrize("tied", [False, True])
def test_a_copy_stands_alone(tied: bool, make_model: Make, make_batch: Make) -> None:
    """Trunk and heads borrow the embedding and the unembedding of their own model, in a copy too."""
    model = make_model(2, tie_embeddings=tied)
    tokens, labels = make_batch(2)
    twin = copy.deepcopy(model)
    expected = twin(tokens, labels).loss
    with torch.no_grad():
        model.embed.weight.zero_()
        model.unembed.weight.zero_()
    assert torch.equal(twin(tokens, labels).loss, expected)
    twin(tokens, labels).loss.backward()
    assert model.embed.weight.grad is None and twin.embed.weight.grad is not None
    assert (twin.unembed.weight is twin.embed.weight) == tied


def test_a_model_made_without_memory_is_materialised_by_reset_parameters() -> None:
    config = MTPConfig(vocab_size=11, d_model=8, n_layers=3, n_attn_heads=2, n_future=2, tie_embeddings=True)
    expected = MTPModel(config)
    torch.manual_seed(3)
    expected.reset_parameters()
    with torch.device("meta"):
        model = MTPModel(config)
    model.to_empty(device="cpu")
    torch.manual_seed(3)
    model.reset_parameters()
    assert model.unembed.weight is model.embed.weight
    for a, b in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_first_loss_is_near_that_of_a_uniform_guess() -> None:
    config = MTPConfig.preset("1M", vocab_size=512)
    labels = torch.randint(512, (2, 68))
    for fields in ({}, {"tie_embeddings": True}):
        model = MTPModel(MTPConfig.from_dict(config.to_dict() | fields))
        head_loss = model(labels[:, :64], labels).head_loss
        assert (head_loss - math.log(512)).abs().amax() < 0.1


def test_initial_scales() -> None:
    config = MTPConfig(vocab_size=2000, d_model=64, n_layers=8, n_attn_heads=2, n_future=4)
    model = MTPModel(config)
    assert model.embed.weight.std().item() == pytest.approx(1.0, rel=0.05)
    assert model.unembed.weight.std().item() == pytest.approx(0.02, rel=0.05)
    for block in (model.trunk.layers[0], model.heads.head(3).block):
        assert block.attention.qkv.weight.std().item() == pytest.approx(64**-0.5, rel=0.05)
        assert block.ff.down.weight.std().item() == pytest.approx((config.ff_dim * 2 * 5) ** -0.5, rel=0.05)
    fields = {"init_std": 0.5, "embed_init_std": 0.1, "unembed_init_std": 0.2, "residual_init_scale": 0.0}
    model = MTPModel(MTPConfig.from_dict(config.to_dict() | fields))
    assert model.trunk.layers[1].ff.gate_up.weight.std().item() == pytest.approx(0.5, rel=0.05)
    assert model.embed.weight.std().item() == pytest.approx(0.1, rel=0.05)
    assert not model.heads.head(1).block.attention.out.weight.any()


@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (1, 1)])
def test_small_and_empty_batches(shape: tuple[int, int], make_model: Make) -> None:
    model = make_model(2)
    tokens = torch.zeros(shape, dtype=torch.int64)
    labels = torch.zeros(shape[0], shape[1] + 2, dtype=torch.int64)
    for schedule in ("sequential", "joint"):
        for document_ids in (None, torch.zeros_like(labels)):
            result = model(tokens, labels, document_ids, schedule=schedule)
            result.loss.backward()
            assert torch.isfinite(result.loss) and (result.loss > 0) == (min(shape) > 0)
    assert model(tokens).shape == (*shape, 37)


@pytest.mark.slow
def test_the_trunk_compiles_to_one_graph(make_model: Make, make_batch: Make) -> None:
    model = make_model(2, n_layers=3)
    tokens, labels = make_batch(2)
    document_ids = (torch.arange(labels.shape[1]) // 5).expand_as(labels)
    compiled = torch.compile(model.trunk, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(
        compiled(tokens, document_ids), model.trunk(tokens, document_ids), rtol=1e-12, atol=1e-12
    )


def test_int32_tokens(make_model: Make, make_batch: Make) -> None:
    model = make_model(2)
    tokens, labels = make_batch(2)
    assert torch.equal(model(tokens.int(), labels.int()).loss, model(tokens, labels).loss)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"tokens": torch.zeros(3, dtype=torch.int64)}, ValueError, r"tokens must be \[B, S\], got int64 \[3\]"),
        ({"tokens": torch.zeros(2, 12)}, TypeError, "tokens must be"),
        ({"tokens": torch.full((2, 12), 37)}, ValueError, r"tokens must be in \[0, 37\), got values from 37 to 37"),
        ({"tokens": torch.full((2, 12), -1)}, ValueError, r"tokens must be in \[0, 37\)"),
        ({"tokens": torch.zeros(2, 65, dtype=torch.int64)}, ValueError, "max_seq_len=64 long, got 65"),
        ({"labels": torch.zeros(2, 11, dtype=torch.int64)}, ValueError, r"labels must be \[B, S'\] with B = 2"),
        ({"labels": torch.full((2, 15), 40)}, ValueError, r"targets must be in \[0, 37\)"),
        ({"document_ids": torch.zeros(2, 9, dtype=torch.int64)}, ValueError, "document_ids must be"),
        ({"document_ids": torch.zeros(2, 12, dtype=torch.int64)}, ValueError, "document_ids must have shape"),
        ({"document_ids": torch.zeros(2, 15)}, TypeError, "document_ids must be"),
        ({"head_weights": [1.0]}, ValueError, "head_weights must hold n = 3 numbers, got 1"),
        ({"normalizer": "all"}, ValueError, "normalizer must be 'per_head'"),
        ({"chunk_rows": 0}, ValueError, "chunk_rows must be at least 1"),
        ({"max_valid": [24, 24, 23]}, ValueError, "max_valid must be at least .* got 23 for the 24 of head 3"),
        ({"schedule": "serial"}, ValueError, "schedule must be 'sequential', 'joint' or 'autograd', got 'serial'"),
    ],
)
@pytest.mark.parametrize("schedule", ["sequential", "joint"])
def test_errors_name_the_argument(
    schedule: str, change: dict[str, Any], error: type[Exception], message: str, make_model: Make, make_batch: Make
) -> None:
    model = make_model(3, max_seq_len=64)
    tokens, labels = make_batch(3)
    with pytest.raises(error, match=message):
        model(**({"tokens": tokens, "labels": labels, "schedule": schedule} | change))


def test_errors_come_before_any_work(make_model: Make, make_batch: Make) -> None:
    model = make_model(3)
    model.trunk.register_forward_pre_hook(lambda *args: pytest.fail("the trunk ran"))
    tokens, labels = make_batch(3)
    for change in ({"schedule": "serial"}, {"head_weights": [1.0]}, {"labels": labels[:, :3]}):
        with pytest.raises(ValueError):
            model(**({"tokens": tokens, "labels": labels} | change))


def test_tied_weights_that_came_apart_are_an_error(make_model: Make, make_batch: Make) -> None:
    """As where one of them is sharded without the other: each would learn on its own."""
    model = make_model(2, tie_embeddings=True)
    model.unembed.weight = torch.nn.Parameter(model.embed.weight.detach().clone())
    with pytest.raises(ValueError, match=r"unembed\.weight must be embed\.weight where tie_embeddings is set"):
        model(*make_batch(2))


def test_heads_check_the_hidden_state(make_model: Make, make_batch: Make) -> None:
    with pytest.raises(ValueError, match=r"hidden must be \[B, S, D\] with D = 16"):
        make_model(3).heads(torch.zeros(2, 12, 8), make_batch(3)[1])
