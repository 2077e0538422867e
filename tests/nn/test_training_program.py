"""What training programs do with a model, in every variant: the sequential order changes none of it."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mtp_ext.nn import MTPModel
from tests.nn.conftest import ALL_VARIANTS, SCHEDULES

pytestmark = pytest.mark.slow

Make = Callable[..., Any]
Error = Callable[[Tensor, Tensor], float]
CHAINED = ("causal", "anticausal", "sequential_modules")
FUSED = ("sequential", "joint")


def step(model: MTPModel, batch: tuple[Tensor, Tensor], seed: int = 7, **keywords: Any) -> dict[str, Tensor]:
    """Gradients of one step from given random numbers, and the loss."""
    model.zero_grad()
    torch.manual_seed(seed)
    loss = model(*batch, **keywords).loss
    loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return grads | {"loss": loss.detach()}


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], error: Error) -> None:
    assert actual.keys() == expected.keys()
    for name in expected:
        assert error(actual[name], expected[name]) < 1e-12, name


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("variant", ALL_VARIANTS)
def test_dropout_draws_the_same_numbers_in_every_schedule(
    variant: str, checkpointing: bool, recompute: bool, make_model: Make, make_batch: Make, relative_error: Error
) -> None:
    model = make_model(3, variant=variant, dropout=0.4)
    batch = make_batch(3)
    expected = step(model, batch, schedule="autograd")
    assert expected["loss"] != step(model, batch, schedule="autograd", seed=8)["loss"]
    model.heads.recompute = recompute
    model.trunk.activation_checkpointing = checkpointing
    for schedule in SCHEDULES:
        assert_close(step(model, batch, schedule=schedule), expected, relative_error)
    model.eval()
    without = model(*batch).loss
    assert torch.equal(without, model(*batch).loss) and without != expected["loss"]


def test_recomputing_leaves_the_generator_where_plain_autograd_does(make_model: Make, make_batch: Make) -> None:
    batch = make_batch(3)
    after = []
    for recompute in (False, True):
        torch.manual_seed(1)
        model = make_model(3, variant="causal", dropout=0.4)
        model.heads.recompute = recompute
        model(*batch).loss.backward()
        after.append(torch.rand(3))
    assert torch.equal(*after)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("variant", CHAINED)
def test_recomputing_changes_no_bit(variant: str, schedule: str, make_model: Make, make_batch: Make) -> None:
    model = make_model(4, variant=variant, dtype=torch.float32)
    batch = make_batch(4)
    kept = step(model, batch, schedule=schedule)
    model.heads.recompute = True
    again = step(model, batch, schedule=schedule)
    assert all(torch.equal(again[name], kept[name]) for name in kept)


@pytest.mark.parametrize("variant", ALL_VARIANTS)
def test_checkpointing_the_trunk_changes_no_bit_and_runs_layers_twice(
    variant: str, make_model: Make, make_batch: Make
) -> None:
    model = make_model(2, variant=variant, dtype=torch.float32)
    batch = make_batch(2)
    kept = step(model, batch)
    model.trunk.activation_checkpointing = True
    calls: Counter[int] = Counter()
    for i, layer in enumerate(model.trunk.layers):
        layer.register_forward_pre_hook(lambda *args, i=i: calls.update([i]))
    again = step(model, batch)
    assert all(torch.equal(again[name], kept[name]) for name in kept)
    assert calls == {i: 2 for i in range(len(model.trunk.layers))}


@pytest.mark.parametrize("schedule", FUSED)
@pytest.mark.parametrize("frozen", ["trunk and embedding", "heads", "head 1", "unembedding", "all but head 2"])
@pytest.mark.parametrize("variant", ALL_VARIANTS)
def test_frozen_parts(
    variant: str, frozen: str, schedule: str, make_model: Make, make_batch: Make, relative_error: Error
) -> None:
    model = make_model(3, variant=variant)
    parts = {
        "trunk and embedding": [model.trunk, model.embed],
        "heads": [model.heads],
        "head 1": [model.heads.head(1)],
        "unembedding": [model.unembed],
        "all but head 2": [model],
    }[frozen]
    for part in parts:
        part.requires_grad_(False)
    if frozen == "all but head 2":
        model.heads.head(2).requires_grad_(True)
    expected = {name for name, p in model.named_parameters() if p.requires_grad}
    if not expected:
        pytest.skip("nothing is left to train")
    batch = make_batch(3)
    plain, ours = step(model, batch, schedule="autograd"), step(model, batch, schedule=schedule)
    assert expected == ours.keys() - {"loss"}
    assert_close(ours, plain, relative_error)


@pytest.mark.parametrize("detached", [(1,), (2, 3), (1, 2, 3)])
@pytest.mark.parametrize("variant", ALL_VARIANTS)
def test_detached_heads_learn_but_send_nothing_back(
    variant: str, detached: tuple[int, ...], make_model: Make, make_batch: Make, relative_error: Error
) -> None:
    model = make_model(3, variant=variant)
    batch = make_batch(3)
    plain = step(model, batch, schedule="autograd", detach_heads=detached)
    for schedule in FUSED:
        assert_close(step(model, batch, schedule=schedule, detach_heads=detached), plain, relative_error)
    trunk = [name for name in plain if name.startswith("trunk.")]
    if detached == (1, 2, 3):
        assert trunk == []
    elif variant in ("parallel", "linear", "replicated"):
        weights = [0.0 if k in detached else 1.0 for k in (1, 2, 3)]
        alone = step(model, batch, schedule="autograd", head_weights=weights)
        assert trunk and all(relative_error(plain[name], alone[name]) < 1e-12 for name in trunk)
    own = {name for name in plain if name.startswith("heads.")}
    assert own == {name for name, _ in model.named_parameters() if name.startswith("heads.")}


@pytest.mark.parametrize("variant", ALL_VARIANTS)
def test_detached_unembedding(variant: str, make_model: Make, make_batch: Make, relative_error: Error) -> None:
    model = make_model(3, variant=variant)
    batch = make_batch(3)
    plain = step(model, batch, schedule="autograd", detach_weight=(2, 3))
    whole = step(model, batch, schedule="autograd")
    assert not torch.allclose(plain["unembed.weight"], whole["unembed.weight"])
    for schedule in FUSED:
        assert_close(step(model, batch, schedule=schedule, detach_weight=(2, 3)), plain, relative_error)


@pytest.mark.parametrize("variant", ALL_VARIANTS)
def test_loss_scaling_accumulation_and_a_second_backward(variant: str, make_model: Make, make_batch: Make) -> None:
    model = make_model(3, variant=variant)
    batches = [make_batch(3), make_batch(3)]
    parts = [step(model, batch) for batch in batches]
    model.zero_grad()
    for batch in batches:
        loss = 1024.0 * model(*batch).loss  # a power of two: exact
        loss.backward(retain_graph=True)
    for name, p in model.named_parameters():
        assert torch.equal(p.grad, 1024.0 * parts[0][name] + 1024.0 * parts[1][name]), name
    loss.backward()
    for name, p in model.named_parameters():
        assert torch.equal(p.grad, 1024.0 * parts[0][name] + 1024.0 * parts[1][name] + 1024.0 * parts[1][name]), name


@pytest.mark.parametrize("variant", ALL_VARIANTS)
@pytest.mark.parametrize("tied", [False, True])
def test_hooks_see_each_whole_gradient_once(variant: str, tied: bool, make_model: Make, make_batch: Make) -> None:
    """What DDP and FSDP2 stand on: nothing during the forward, then one call for each parameter."""
    model = make_model(3, variant=variant, tie_embeddings=tied)
    batch = make_batch(3)
    expected = step(model, batch)
    model.zero_grad()
    seen: dict[str, list[Tensor]] = {name: [] for name, _ in model.named_parameters()}
    accumulated: Counter[str] = Counter()
    for name, p in model.named_parameters():
        p.register_hook(lambda grad, name=name: seen[name].append(grad.clone()))
        p.register_post_accumulate_grad_hook(lambda p, name=name: accumulated.update([name]))
    result = model(*batch)
    assert not any(seen.values())
    result.loss.backward()
    assert accumulated == Counter(seen.keys())
    for name, grads in seen.items():
        assert len(grads) == 1 and torch.equal(grads[0], expected[name]), name


@pytest.mark.parametrize("variant", ALL_VARIANTS)
def test_a_vector_of_losses(variant: str, make_model: Make, make_batch: Make, relative_error: Error) -> None:
    """Incoming gradients that differ from batch to batch, in one backward."""
    model = make_model(2, variant=variant)
    batches = [make_batch(2) for _ in range(3)]
    scales = torch.tensor([2.0, -0.5, 0.0], dtype=torch.float64)
    parts = [step(model, batch) for batch in batches]
    model.zero_grad()
    torch.stack([model(*batch).loss for batch in batches]).backward(scales)
    for name, p in model.named_parameters():
        expected = sum(scale * part[name] for scale, part in zip(scales, parts, strict=True))
        assert relative_error(p.grad, expected) < 1e-12, name


@pytest.mark.parametrize("variant", ALL_VARIANTS)
def test_clipped_steps_end_at_the_same_parameters(variant: str, make_model: Make, make_batch: Make) -> None:
    model = make_model(3, variant=variant)
    batch = make_batch(3)
    losses: dict[str, list[float]] = {}
    for schedule in SCHEDULES:
        own = copy.deepcopy(model)
        optimizer = torch.optim.AdamW(own.parameters(), lr=0.01)
        losses[schedule] = []
        for _ in range(4):
            optimizer.zero_grad()
            loss = own(*batch, schedule=schedule).loss
            loss.backward()
            nn.utils.clip_grad_norm_(own.parameters(), 0.5)
            optimizer.step()
            losses[schedule].append(loss.item())
    assert losses["autograd"][-1] < losses["autograd"][0]
    for schedule in FUSED:
        assert losses[schedule] == pytest.approx(losses["autograd"], rel=1e-9)


@pytest.mark.parametrize("variant", ["parallel", "linear", "causal", "sequential_modules"])
def test_compiled_trunk_and_head_blocks(
    variant: str, make_model: Make, make_batch: Make, relative_error: Error
) -> None:
    """In every schedule, and the head blocks are compiled once for all steps."""
    model = make_model(2, variant=variant)
    batch = make_batch(2)
    expected = step(model, batch, schedule="autograd")
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        from torch._dynamo.backends.debugging import aot_eager

        graphs.append(graph)
        return aot_eager(graph, inputs)

    torch._dynamo.reset()
    blocks = [*model.trunk.layers, *(b for k in (1, 2) if (b := model.heads.head(k).block) is not None)]
    for block in blocks:
        block.compile(backend=backend)
    for schedule in SCHEDULES:
        assert_close(step(model, batch, schedule=schedule), expected, relative_error)
    compiled = len(graphs)
    assert compiled >= 1
    for schedule in SCHEDULES:
        step(model, batch, schedule=schedule)
    assert len(graphs) == compiled
    torch._dynamo.reset()


@pytest.mark.parametrize("variant", ALL_VARIANTS)
@pytest.mark.parametrize("schedule", FUSED)
def test_autocast_error_is_at_most_twice_that_of_plain_torch(
    schedule: str, variant: str, make_model: Make, make_batch: Make
) -> None:
    model = make_model(3, variant=variant, dtype=torch.float32)
    batch = make_batch(3)

    def run(schedule: str) -> dict[str, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            result = model(*batch, schedule=schedule)
        model.zero_grad()
        result.loss.backward()
        return {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}

    eager, ours = run("autograd"), run(schedule)
    model.double()
    exact = step(model, batch, schedule="autograd")
    for name in eager:
        budget = 2 * (eager[name] - exact[name]).norm() + 1e-3 * exact[name].norm()
        assert (ours[name] - exact[name]).norm() <= budget, name


@pytest.mark.parametrize("variant", ALL_VARIANTS)
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_softcap_and_a_given_token_count(
    softcap: float | None, variant: str, make_model: Make, make_batch: Make, relative_error: Error
) -> None:
    model = make_model(3, variant=variant, softcap=softcap)
    batch = make_batch(3)
    plain = step(model, batch, schedule="autograd", normalizer=17.0)
    for schedule in FUSED:
        assert_close(step(model, batch, schedule=schedule, normalizer=17.0), plain, relative_error)
        metrics = [model(*batch, schedule=s) for s in (schedule, "autograd")]
        for name in ("n_valid", "top1", "accept_length"):
            assert torch.equal(*(getattr(m, name) for m in metrics)), name
    if softcap is not None:
        assert model(batch[0]).abs().amax() < softcap
