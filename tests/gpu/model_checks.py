"""A whole model on a GPU: norms and decoding by the kernels, and a training step captured in a CUDA graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mtp_ext.generate import generate
from mtp_ext.nn import MTPConfig, MTPModel
from mtp_ext.ops import rms_norm
from mtp_ext.ops import top_classes as decode
from tests.gpu.registry import CannotRun, check

VOCAB, WIDTH, HEADS = 211, 64, 3


def make_model(device: torch.device, dtype: torch.dtype = torch.float32, variant: str = "parallel") -> MTPModel:
    torch.manual_seed(0)
    config = MTPConfig(VOCAB, WIDTH, 5, 4, n_future=HEADS, max_seq_len=64, variant=variant, unembed_init_std=0.5)
    return MTPModel(config).to(device, dtype)


def make_batch(device: torch.device) -> tuple[Tensor, Tensor]:
    labels = torch.randint(VOCAB, (2, 20 + HEADS), generator=torch.Generator().manual_seed(1)).to(device)
    return labels[:, :20], labels


def gradients(model: MTPModel, schedule: str) -> list[Tensor]:
    loss = model(*make_batch(model.embed.weight.device), schedule=schedule).loss
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


def assert_norms_run_by_the_kernel(device: torch.device) -> None:
    if device.type == "cuda":
        assert rms_norm.uses_kernel(torch.empty(2, WIDTH, device=device), torch.empty(WIDTH, device=device))


@check(part="late")
def models_equal_the_cpu_in_float64(device: torch.device) -> None:
    """float32 without TF32: an error of 1e-4 of the largest element of each gradient."""
    assert_norms_run_by_the_kernel(device)
    for variant in ("parallel", "linear", "replicated", "causal"):
        model = make_model(device, variant=variant)
        exact_model = make_model(torch.device("cpu"), torch.float64, variant)
        exact_model.load_state_dict(model.state_dict())
        exact = gradients(exact_model, "autograd")
        for schedule in ("joint", "sequential"):
            for ours, truth in zip(gradients(model, schedule), exact, strict=True):
                worst = (ours.double().cpu() - truth).abs().max()
                assert worst <= 1e-4 * truth.abs().max(), f"{variant}, {schedule}: off by {worst:.3g}"


@check(part="late")
def greedy_tokens_equal_the_cpus(device: torch.device) -> None:
    model, on_cpu = make_model(device), make_model(torch.device("cpu"))
    on_cpu.load_state_dict(model.state_dict())
    prompts = [torch.arange(length) for length in (3, 9, 5)]
    for options in ({}, {"temperature": 1.0, "top_k": 1}):
        ours = generate(model, prompts, 24, **options).tokens
        theirs = generate(on_cpu, prompts, 24, **options).tokens
        assert [x.tolist() for x in ours] == [x.tolist() for x in theirs]


@check()
def greedy_classes_in_16_bits_equal_the_gemms(device: torch.device) -> None:
    """Where the best logit is ahead by more than a GEMM's rounding of it to bfloat16."""
    model = make_model(device, torch.bfloat16)
    normed = torch.randn(16, WIDTH, device=device).bfloat16()
    if device.type == "cuda":
        assert decode.uses_kernel(normed, model.heads.unembedding, 1)
    with torch.no_grad():
        classes = model.heads.best_classes(1, normed, 1)[1][:, 0]
        best = model.heads.logits(1, normed).float().topk(2)
    clear = best.values[:, 0] - best.values[:, 1] > 2.0**-6 * best.values[:, 0].abs()
    assert int(clear.sum()) > 4 and torch.equal(classes[clear], best.indices[:, 0][clear])


def train(model: MTPModel, batch: tuple[Tensor, Tensor], optimizer: Any, schedule: str) -> Tensor:
    optimizer.zero_grad(set_to_none=True)
    loss: Tensor = model(*batch, schedule=schedule).loss
    loss.backward()
    optimizer.step()
    return loss.detach()


@check(part="late")
def a_captured_training_step_equals_the_eager_one(device: torch.device) -> None:
    """Forward, backward and optimizer step, captured after a warm-up and replayed."""
    if device.type != "cuda":
        raise CannotRun("graphs are CUDA's")
    for schedule in ("joint", "sequential"):
        models = [make_model(device) for _ in range(2)]
        batch = make_batch(device)
        optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-3, capturable=True) for m in models]
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            for _ in range(3):
                train(models[0], batch, optimizers[0], schedule)
        torch.cuda.current_stream(device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        optimizers[0].zero_grad(set_to_none=True)
        with torch.cuda.graph(graph):
            captured = train(models[0], batch, optimizers[0], schedule)
        losses = []
        for _ in range(3):  # capturing runs nothing: these are steps 4 to 6
            graph.replay()
            losses.append(captured.clone())
        eager = [train(models[1], batch, optimizers[1], schedule) for _ in range(6)]
        torch.testing.assert_close(torch.stack(losses), torch.stack(eager[3:]), rtol=1e-5, atol=1e-6)
        for ours, theirs in zip(models[0].parameters(), models[1].parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
