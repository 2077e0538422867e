"""``mtp_ext.distributed``: one call shards any model, and clipping is that of one process (gloo, 2 and 3 processes)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from mtp_ext.distributed import clip_grad_norm_, fully_shard_
from mtp_ext.nn import ComposedModel, MTPModel
from mtp_ext.nn.schedules.fsdp import sharded_modules
from mtp_ext.nn.variants import VARIANTS
from tests.distributed.test_fully_sharded import N, S, V, make_composed, make_model
from tests.support import forked

if dist.is_available():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")

Model = Any  # MTPModel or ComposedModel


def make_sharing() -> ComposedModel:
    """Heads 1 and 2 share a matrix, the trunk ends in the unembedding's transpose: neither can be a unit."""
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Embedding(V, 16), nn.Sequential(nn.Linear(16, 16)), nn.Linear(16, 16))
    unembed, common = nn.Linear(16, V, bias=False), nn.Linear(16, 16)
    unembed.weight = trunk[0].weight
    heads = [nn.Sequential(common), nn.Sequential(common, nn.GELU()), nn.Linear(16, 16)]
    return ComposedModel(trunk, heads, unembed).double()


def make_huggingface(family: str, variant: str, tied: bool) -> ComposedModel:
    import transformers

    from mtp_ext.nn.huggingface import from_huggingface

    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(
        **{"vocab_size": V, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "head_dim": 8},
        **{"num_attention_heads": 2, "num_key_value_heads": 2, "tie_word_embeddings": tied, "sliding_window": 4},
    )
    model = getattr(transformers, f"{family}ForCausalLM")(config).double()
    return from_huggingface(model, N, variant, init="random" if variant != "shared" else "copy_last_layer")


def make_frozen_trunk() -> MTPModel:
    model = make_model("causal")
    model.trunk.requires_grad_(False)
    return model


def cases() -> dict[str, tuple[Callable[[], Model], dict[str, Any]]]:
    found: dict[str, tuple[Callable[[], Model], dict[str, Any]]] = {}
    for variant in VARIANTS:
        for schedule in ("sequential", "joint"):
            found[f"{variant}, {schedule}"] = (lambda variant=variant: make_model(variant), {"schedule": schedule})
    for variant in ("parallel", "replicated", "sequential_modules"):
        for schedule in ("sequential", "joint"):
            make = lambda variant=variant: make_model(variant, tie_embeddings=True)  # noqa: E731
            found[f"tied {variant}, {schedule}"] = (make, {"schedule": schedule})
    found |= {
        "shared norm": (lambda: make_model("anticausal", shared_final_norm=True), {}),
        "frozen trunk": (make_frozen_trunk, {}),
        "weight 0": (make_model, {"head_weights": [0.0, 0.5, 2.0]}),
        "composed": (make_composed, {}),
        "sharing": (make_sharing, {}),
        "sharing, joint": (make_sharing, {"schedule": "joint"}),
        "llama": (lambda: make_huggingface("Llama", "causal", False), {}),
        "llama tied": (lambda: make_huggingface("Llama", "parallel", True), {}),
        "llama shared": (lambda: make_huggingface("Llama", "shared", False), {"schedule": "joint"}),
        "gemma2": (lambda: make_huggingface("Gemma2", "anticausal", True), {}),
        "qwen3 linear": (lambda: make_huggingface("Qwen3", "linear", False), {}),
    }
    return found


def whole(x: Any) -> Any:
    return x.full_tensor() if isinstance(x, DTensor) else x


def compare(make: Callable[[], Model], call: dict[str, Any], **keywords: Any) -> None:
    """Two steps of two micro-steps, against one process with every rank's rows."""
    alone, model = make(), make()
    # transformers' norms compute in float32, whatever the model's dtype.
    exact = (
        {"rtol": 1e-11, "atol": 1e-13} if not hasattr(alone.trunk, "language_model") else {"rtol": 1e-5, "atol": 1e-7}
    )
    rank, world = dist.get_rank(), dist.get_world_size()
    assert fully_shard_(model, **keywords) is model
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (alone, model)]
    batches = torch.randint(V, (4, world, S + N), generator=torch.Generator().manual_seed(1))
    for i, labels in enumerate(batches):
        model.set_requires_gradient_sync(i % 2 == 1)
        expected = alone(labels[:, :S], labels, **{**call, "schedule": "autograd"}).loss
        expected.backward()
        ours = labels[rank : rank + 1]
        loss = model(ours[:, :S], ours, **call).loss
        loss.backward()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        torch.testing.assert_close(mean / world, expected.detach(), **exact)
        if i % 2 == 0:
            continue
        norm = torch.nn.utils.clip_grad_norm_(alone.parameters(), 0.5)
        torch.testing.assert_close(clip_grad_norm_(model.parameters(), 0.5), norm, **exact)
        for (name, mine), theirs in zip(model.named_parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(whole(mine.grad), theirs.grad, **exact, msg=lambda m, n=name: n + m)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for mine, theirs in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(whole(mine), theirs, **exact)


def check_units() -> None:
    """What each model's units are, by name; nothing is left unsharded."""
    heads = [f"heads.{k}" for k in range(N)]
    for make, expected in (
        (lambda: make_model("causal"), ["trunk.layers.0", *heads, "embed", "unembed"]),
        (lambda: make_model("causal", tie_embeddings=True), ["trunk.layers.0", *heads]),
        (lambda: make_model("shared"), ["trunk.layers.0", "embed", "unembed"]),
        (make_sharing, ["trunk.1", "trunk.2", heads[2]]),
        (lambda: make_huggingface("Llama", "causal", True), ["trunk.base.layers.0", "trunk.base.layers.1", *heads]),
    ):
        model = fully_shard_(make())
        names = {module: name for name, module in model.named_modules()}
        units = {names[module] for module in sharded_modules(model.modules())}
        assert units == {"", *expected}, units
        assert all(isinstance(p, DTensor) for p in model.parameters())


def check_arguments() -> None:
    with pytest.raises(TypeError, match="model must be an MTPModel or a ComposedModel, got Linear"):
        fully_shard_(nn.Linear(2, 2))  # type: ignore[type-var]
    model = make_model()
    with pytest.raises(ValueError, match=r"blocks must be modules of model\.trunk, got Head"):
        fully_shard_(model, blocks=[model.heads.head(1)])
    assert not sharded_modules(model.modules())
    fully_shard_(model, blocks=[model.trunk.layers[0].ff])
    assert isinstance(model.trunk.layers[0].ff, FSDPModule) and not isinstance(model.trunk.layers[0], FSDPModule)
    with pytest.raises(ValueError, match="must not be sharded yet"):
        fully_shard_(model)


def check_mixed_precision_and_logits() -> None:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = fully_shard_(make_model("causal").float(), mp_policy=policy, reshard_after_forward=False)
    tokens = torch.randint(V, (1, S + N), generator=torch.Generator().manual_seed(2))
    model(tokens[:, :S], tokens).loss.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())
    exact, sharded = make_model("causal"), fully_shard_(make_model("causal"))
    torch.testing.assert_close(sharded.all_logits(tokens), exact.all_logits(tokens), rtol=1e-12, atol=1e-12)


def check_clipping() -> None:
    """Gradients on several meshes, in every placement, of several dtypes, of an empty shard, none, not finite."""
    world = dist.get_world_size()
    meshes = [init_device_mesh("cpu", (world,)), init_device_mesh("cpu", (1, world), mesh_dim_names=("a", "b"))]
    torch.manual_seed(0)
    # The last two are uneven, and with three processes leave one a shard of no rows.
    grads = [torch.randn(shape, dtype=torch.float64) for shape in ((5, 3), (4,), (2, 3), (7,), (1, 2))]
    layouts: list[Any] = [None, (meshes[0], [Shard(0)]), (meshes[1], [Replicate(), Shard(1)])]
    layouts += [(meshes[1], [Replicate(), Replicate()]), (meshes[0], [Shard(0)])]

    def parameter(grad: Tensor, layout: Any) -> Tensor:
        made = grad if layout is None else distribute_tensor(grad, *layout)
        p = nn.Parameter(torch.zeros_like(made))
        p.grad = copy.deepcopy(made)
        return p

    for limit in (0.0, 0.5, 1e6, float("inf")):
        expected = [parameter(grad, None) for grad in grads]
        ours = [parameter(grad, layout) for grad, layout in zip(grads, layouts, strict=True)]
        norm = torch.nn.utils.clip_grad_norm_(expected, limit)
        found = clip_grad_norm_((p for p in [*ours, nn.Parameter(torch.zeros(2))]), limit)
        assert type(found) is Tensor and found.shape == ()
        torch.testing.assert_close(found, norm, rtol=1e-13, atol=0)
        for mine, theirs in zip(ours, expected, strict=True):
            torch.testing.assert_close(whole(mine.grad), theirs.grad, rtol=1e-13, atol=0)
    # A gradient that is a sum not yet taken over the ranks.
    summed = nn.Parameter(distribute_tensor(grads[0], meshes[0], [Replicate()]))
    summed.grad = DTensor.from_local(grads[0] / world, meshes[0], [Partial()])
    torch.testing.assert_close(clip_grad_norm_(summed, 0.5), grads[0].norm(), rtol=1e-13, atol=0)
    torch.testing.assert_close(whole(summed.grad).norm(), torch.tensor(0.5).double(), rtol=1e-5, atol=0)
    mixed = [parameter(grads[0].float(), layouts[1]), parameter(grads[1].bfloat16(), None), parameter(grads[2], None)]
    expected_norm = torch.stack([grads[i].norm() for i in range(3)]).norm()
    torch.testing.assert_close(clip_grad_norm_(mixed, 1.0).double(), expected_norm, rtol=1e-2, atol=0)
    assert mixed[1].grad is not None and mixed[1].grad.dtype == torch.bfloat16
    broken = parameter(torch.full((3,), float("nan")), layouts[1])
    assert clip_grad_norm_([*ours, broken], 1.0).isnan()


def worker(rank: int, store: str, world: int) -> None:
    torch.set_num_threads(1)
    timeout = timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timeout)
    for check in (check_units, check_arguments, check_mixed_precision_and_logits, check_clipping):
        check()
    for name, (make, call) in cases().items():
        try:
            compare(make, call)
        except Exception as error:
            raise AssertionError(f"{name} on {world} processes") from error
    for shape in ((1, world), (world, 1)):
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))
        compare(lambda: make_model("causal"), {}, mesh=mesh)
        compare(make_model, {"schedule": "joint"}, mesh=mesh, reshard_after_forward=False)
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("world", [3])
def test_one_call_trains_as_one_process(tmp_path: Path, world: int) -> None:
    forked.call_ranks(worker, world, str(tmp_path / "store"), world)


def test_a_mesh_is_needed_without_processes() -> None:
    with pytest.raises(ValueError, match="mesh must be given where"):
        fully_shard_(make_model())


def test_clipping_without_processes_is_that_of_torch() -> None:
    gradient = torch.randn(4, 3)
    ours, theirs = nn.Parameter(torch.zeros(4, 3)), nn.Parameter(torch.zeros(4, 3))
    ours.grad, theirs.grad = gradient.clone(), gradient.clone()
    norm = torch.nn.utils.clip_grad_norm_(theirs, 0.1)
    assert torch.equal(clip_grad_norm_(ours, 0.1), norm) and torch.equal(ours.grad, theirs.grad)
    assert clip_grad_norm_([nn.Parameter(torch.zeros(2))], 1.0) == 0
    for limit in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="max_norm must be a number of at least 0, got"):
            clip_grad_norm_(ours, limit)
