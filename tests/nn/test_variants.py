"""Every architecture against its definition, written out with the modules of the model and plain torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mtp_ext.nn import MTPConfig, MTPModel
from mtp_ext.nn.interop.convert import convert
from tests.nn.conftest import ALL_VARIANTS, PAPER_VARIANTS, VOCAB_SIZE

Make = Callable[..., Any]
Error = Callable[[Tensor, Tensor], float]


def layer_outputs(model: MTPModel, z: Tensor, context: Any, whole: Tensor) -> dict[int, Tensor]:
    """``h_k`` of appendix B for ``k = 1..n``, by the variant's formula."""
    n, variant = model.config.n_future, model.config.variant
    block = {k: model.heads.head(k).block for k in range(1, n + 1)}
    if variant in ("replicated", "shared"):
        return dict.fromkeys(range(1, n + 1), z)
    if variant == "linear":
        return {k: z @ block[k].weight.T for k in block}
    if variant == "parallel":
        return {k: block[k](z, context) for k in block}
    outputs: dict[int, Tensor] = {}
    for k in reversed(block) if variant == "anticausal" else block:
        before = outputs.get(k + 1 if variant == "anticausal" else k - 1, z)
        if variant != "sequential_modules":
            outputs[k] = block[k](before, context)
        elif k == 1:
            outputs[k] = z
        else:
            m, tokens = block[k], whole[:, k - 1 : k - 1 + z.shape[1]]
            joined = torch.cat([m.state_norm(before), m.token_norm(model.embed.weight[tokens])], -1)
            outputs[k] = m.block(joined @ m.joint.weight.T, context)
    return outputs


def naive_loss(
    model: MTPModel, whole: Tensor, labels: Tensor, document_ids: Tensor | None, head_weights: list[float] | None
) -> tuple[Tensor, Tensor]:
    """The plain weighted sum of the heads' losses with all logits, and the trunk's output.

    ``labels`` are the tokens ``whole``, of which some are masked.
    """
    n, seq_len = model.config.n_future, whole.shape[1] - model.config.n_future
    tokens = whole[:, :seq_len]
    context = model.trunk.context(tokens, document_ids)
    z = model.trunk(tokens, context=context)
    z.retain_grad()
    loss = z.new_zeros(())
    for k, state in layer_outputs(model, z, context, whole).items():
        norm = model.heads.norm if model.heads.norm is not None else model.heads.head(k).norm
        weight = model.heads.unembedding
        logits = norm(state) @ (weight if weight.dim() == 2 else weight[k - 1]).T
        targets = labels[:, k : k + seq_len].clone()
        if document_ids is not None:
            targets[document_ids[:, k : k + seq_len] != document_ids[:, :seq_len]] = -100
        scale = 1.0 if head_weights is None else head_weights[k - 1]
        total = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
        loss = loss + scale * total / (targets != -100).sum().clamp(min=1)
    assert set(range(1, n + 1)) == set(layer_outputs(model, z, context, whole))
    return loss, z


def gradients(model: MTPModel, z: Tensor) -> dict[str, Tensor]:
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert z.grad is not None
    model.zero_grad()
    return grads | {"trunk output": z.grad.clone()}


CASES: dict[str, dict[str, bool]] = {
    "plain": {},
    "documents": {"documents": True},
    "weights, ignored": {"weights": True, "ignored": True},
    "all": {"documents": True, "weights": True, "ignored": True},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("n_future", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("variant", ALL_VARIANTS)
def test_gradients_are_those_of_the_plain_sum_of_losses(
    variant: str, n_future: int, tied: bool, case: str, make_model: Make, make_batch: Make, relative_error: Error
) -> None:
    model = make_model(n_future, variant=variant, tie_embeddings=tied)
    tokens, whole = make_batch(n_future)
    choice, labels, ahead = CASES[case], whole, {}
    document_ids, head_weights = None, None
    if choice.get("documents"):
        document_ids = torch.arange(labels.shape[1])[None].add(torch.tensor([[0], [2]])).floor_divide(5)
    if choice.get("weights"):
        head_weights = [0.5 + k for k in range(n_future)]
    if choice.get("ignored"):
        labels = torch.where(torch.rand(labels.shape) < 0.3, -100, labels)
        ahead = {"tokens_ahead": whole}
    expected, z = naive_loss(model, whole, labels, document_ids, head_weights)
    expected.backward()
    expected_grads = gradients(model, z)
    for schedule in ("sequential", "joint", "autograd"):
        kept: list[Tensor] = []
        handle = model.trunk.register_forward_hook(lambda m, a, out, kept=kept: out.retain_grad() or kept.append(out))
        result = model(tokens, labels, document_ids, head_weights, schedule=schedule, **ahead)
        handle.remove()
        result.loss.backward()
        grads = gradients(model, kept[0])
        assert relative_error(result.loss, expected) < 1e-12
        assert grads.keys() == expected_grads.keys()
        for name in grads:
            assert relative_error(grads[name], expected_grads[name]) < 1e-12, (schedule, name)


@pytest.mark.parametrize("n_future", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("tied", [False, True])
def test_anticausal_with_the_heads_reversed_is_causal(
    n_future: int, tied: bool, make_model: Make, make_batch: Make
) -> None:
    """``U h_k h_{k+1} .. h_n`` with ``h_k = g_{n+1-k}`` is the causal model's head ``n + 1 - k``."""
    causal = make_model(n_future, variant="causal", tie_embeddings=tied)
    anticausal = make_model(n_future, variant="anticausal", tie_embeddings=tied)
    state = causal.state_dict()
    for k in range(n_future):
        state |= {
            f"heads.{n_future - 1 - k}.{name}": value for name, value in causal.heads.head(k + 1).state_dict().items()
        }
    anticausal.load_state_dict(state)
    tokens, _ = make_batch(n_future)
    assert torch.equal(anticausal.all_logits(tokens), causal.all_logits(tokens).flip(0))
    if n_future > 1:
        assert not torch.allclose(causal.all_logits(tokens)[0], causal.all_logits(tokens)[1])


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("variant", "to"), [(v, v) for v in ALL_VARIANTS if v != "replicated"] + [("shared", "replicated")]
)
def test_equal_copies_of_the_unembedding_are_the_shared_one(
    variant: str, to: str, tied: bool, make_model: Make, make_batch: Make, relative_error: Error
) -> None:
    """The same loss, and a shared gradient that is the sum over the copies."""
    shared = make_model(3, variant=variant, tie_embeddings=tied)
    copies = convert(shared, variant=to, replicate_unembedding=True)
    batch = make_batch(3)
    assert copies.heads.unembedding.shape == (3, VOCAB_SIZE, 16)
    one, three = shared(*batch), copies(*batch)
    assert relative_error(three.loss, one.loss) < 1e-14
    one.loss.backward()
    three.loss.backward()
    if tied:
        total = copies.embed.weight.grad + copies.unembed.weight.grad.sum(0)
        assert relative_error(total, shared.embed.weight.grad) < 1e-12
    else:
        assert relative_error(copies.unembed.weight.grad.sum(0), shared.unembed.weight.grad) < 1e-12
        assert relative_error(copies.embed.weight.grad, shared.embed.weight.grad) < 1e-12
    back = convert(copies, variant=variant, replicate_unembedding=False)
    assert back.config == shared.config
    for name, value in shared.state_dict().items():
        assert torch.equal(back.state_dict()[name], value), name


@pytest.mark.parametrize("schedule", ["sequential", "joint", "autograd"])
@pytest.mark.parametrize("variant", ALL_VARIANTS)
def test_one_head_is_an_ordinary_model_with_the_same_layers(
    variant: str, schedule: str, make_model: Make, make_batch: Make, relative_error: Error
) -> None:
    """The parallel model of one head is that (test_model.py shows it against a decoder by definition); a linear head of
    one is a decoder with one more matrix."""
    model = make_model(1, variant=variant)
    tokens, labels = make_batch(1)
    p = {name: x.detach().clone().requires_grad_() for name, x in model.named_parameters()}
    context = model.trunk.context(tokens)
    x = p["embed.weight"][tokens]
    layers = [(f"trunk.layers.{i}.", layer) for i, layer in enumerate(model.trunk.layers)]
    if variant in ("parallel", "causal", "anticausal"):
        layers.append(("heads.0.block.", model.heads.head(1).block))
    for prefix, layer in layers:
        own = {name.removeprefix(prefix): value for name, value in p.items() if name.startswith(prefix)}
        x = torch.func.functional_call(layer, own, (x, context), strict=True)
    if variant == "linear":
        x = x @ p["heads.0.block.weight"].T
    norm = "heads.norm.weight" if variant == "shared" else "heads.0.norm.weight"
    x = F.rms_norm(x, (16,), p[norm], model.config.norm_eps)
    logits = x @ p["unembed.weight"].view(VOCAB_SIZE, 16).T
    expected = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
    expected.backward()
    loss = model(tokens, labels, schedule=schedule).loss
    loss.backward()
    assert relative_error(loss, expected) < 1e-12
    for name, parameter in model.named_parameters():
        assert relative_error(parameter.grad, p[name].grad) < 1e-12, name


@pytest.mark.parametrize("variant", ALL_VARIANTS)
def test_which_head_reads_which(variant: str, make_model: Make, make_batch: Make) -> None:
    """A change of head 2's layer reaches the heads that read it, and no other."""
    if variant in ("replicated", "shared"):
        pytest.skip("its heads have no layers")
    model = make_model(3, variant=variant)
    tokens, _ = make_batch(3)
    before = model.all_logits(tokens)
    with torch.no_grad():
        next(p for name, p in model.heads.head(2).block.named_parameters() if p.ndim == 2).mul_(2)
    after = model.all_logits(tokens)
    changed = {k for k in (1, 2, 3) if not torch.equal(before[k - 1], after[k - 1])}
    expected = {"parallel": {2}, "linear": {2}, "causal": {2, 3}, "anticausal": {1, 2}, "sequential_modules": {2, 3}}
    assert changed == expected[variant]


@pytest.mark.parametrize("n_future", [1, 3])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("variant", ALL_VARIANTS)
def test_counts_are_those_of_the_model(variant: str, tied: bool, n_future: int, make_model: Make) -> None:
    model = make_model(n_future, variant=variant, tie_embeddings=tied)
    counts = model.config.parameter_counts()
    for part in ("embed", "trunk", "heads"):
        assert counts[part] == sum(p.numel() for p in model.get_submodule(part).parameters()), part
    assert counts["total"] == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("variant", ALL_VARIANTS)
def test_flops_are_those_of_the_matrix_products(variant: str, make_model: Make, make_batch: Make) -> None:
    n, batch, seq_len = 3, 2, 12
    model = make_model(n, variant=variant, dtype=torch.float32)
    tokens, labels = make_batch(n, batch, seq_len)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(tokens, labels, chunk_rows=4)
    flops = model.config.forward_flops(seq_len)
    # The counter takes attention for all S x S pairs; ours counts those that are not masked.
    layers = model.config.n_layers * 4 * 16 * (seq_len - (seq_len + 1) / 2)
    assert counter.get_total_flops() == pytest.approx(batch * seq_len * (flops["total"] + layers), rel=1e-9)


@pytest.mark.parametrize("variant", ALL_VARIANTS)
def test_state_dicts_load_strictly_and_round_trip(variant: str, make_model: Make, make_batch: Make) -> None:
    model, other = make_model(3, variant=variant), make_model(3, variant=variant)
    tokens, _ = make_batch(3)
    state = model.state_dict()
    other.load_state_dict(state)
    assert torch.equal(model.all_logits(tokens), other.all_logits(tokens))
    for name in state:
        with pytest.raises(RuntimeError, match=f"Missing key.*{name}"):
            other.load_state_dict({k: v for k, v in state.items() if k != name})


def test_heads_of_another_number_do_not_load(make_model: Make) -> None:
    for variant in PAPER_VARIANTS:
        with pytest.raises(RuntimeError, match=r"Unexpected key.*heads\.3\."):
            make_model(3, variant=variant).load_state_dict(make_model(4, variant=variant).state_dict())


@pytest.mark.parametrize("variant", ALL_VARIANTS)
def test_the_future_is_not_seen(variant: str, make_model: Make, make_batch: Make) -> None:
    """A changed token reaches no head at a position before it; a module of depth k reads k - 1 tokens ahead."""
    model = make_model(3, variant=variant)
    tokens, _ = make_batch(3)
    changed = tokens.clone()
    changed[:, 7] = (changed[:, 7] + 1) % VOCAB_SIZE
    before, after = model.all_logits(tokens), model.all_logits(changed)
    for k in (1, 2, 3):
        first = 7 - (k - 1) * (variant == "sequential_modules")
        assert torch.equal(before[k - 1, :, :first], after[k - 1, :, :first])
        assert not torch.isclose(before[k - 1, :, first:], after[k - 1, :, first:]).all()


def test_a_vocabulary_row_of_n_targets_has_no_parameters_of_its_own() -> None:
    shape = {"vocab_size": 50, "d_model": 16, "n_layers": 3, "n_attn_heads": 2, "variant": "shared"}
    one, eight = (MTPConfig(**shape, n_future=n).parameter_counts()["total"] for n in (1, 8))
    assert one == eight


def test_the_checkpoint_format_of_the_parallel_model_stays() -> None:
    """Names, shapes, their order (which an optimiser's state counts by) and configurations of before the variants."""
    old = {"vocab_size": 11, "d_model": 8, "n_layers": 3, "n_attn_heads": 2, "n_kv_heads": None, "d_ff": 12}
    old |= {"max_seq_len": 32, "n_future": 2, "variant": "parallel", "tie_embeddings": False, "rope_theta": 10000.0}
    old |= {"shared_final_norm": False, "norm_eps": 1e-5, "init_std": None, "embed_init_std": None}
    old |= {"unembed_init_std": 0.02, "residual_init_scale": None}
    block = {
        "attention_norm.weight": [8],
        "attention.qkv.weight": [24, 8],
        "attention.out.weight": [8, 8],
        "ff_norm.weight": [8],
        "ff.gate_up.weight": [24, 8],
        "ff.down.weight": [8, 12],
    }
    expected = {"embed.weight": [11, 8], "unembed.weight": [11, 8]}
    expected |= {f"trunk.layers.0.{name}": shape for name, shape in block.items()}
    for k in range(2):
        expected |= {f"heads.{k}.block.{name}": shape for name, shape in block.items()}
        expected |= {f"heads.{k}.norm.weight": [8]}
    model = MTPModel(MTPConfig.from_dict(old))
    assert [(n, list(p.shape)) for n, p in model.named_parameters()] == list(expected.items())
    assert set(model.state_dict()) == set(expected)
