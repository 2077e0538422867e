"""How the loss behaves as a user of the device: streams, graphs, other devices, memory that runs out, no waiting."""

from __future__ import annotations

import torch
from torch import Tensor

import mtp_ext
from tests.gpu.registry import CannotRun, check

V, D, N = 1003, 64, 300


def operands(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    hidden = torch.randn(N, D, generator=g).to(device, torch.bfloat16).requires_grad_()
    weight = torch.randn(V, D, generator=g).to(device, torch.bfloat16).requires_grad_()
    return hidden, weight, torch.randint(V, (N,), generator=g).to(device)


def step(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    loss = mtp_ext.linear_cross_entropy(hidden, weight, targets)
    assert isinstance(loss, Tensor)
    return (loss.detach(), *torch.autograd.grad(loss, (hidden, weight)))


def assert_equal(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> None:
    assert all(torch.equal(x.cpu(), y.cpu()) for x, y in zip(a, b, strict=True))


@check()
def no_host_waits(device: torch.device) -> None:
    inputs = operands(device)
    step(*inputs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(*inputs)
        labels = torch.zeros(2, 40, dtype=torch.int64, device=device)
        mtp_ext.multi_token_cross_entropy(
            torch.zeros(2, 2, 38, D, device=device, dtype=torch.bfloat16),
            inputs[1],
            labels,
            head_weights=[1.0, 0.5],
            token_weights=torch.ones(2, 40, device=device),
            class_weights=torch.ones(V, device=device),
            label_smoothing=0.1,
        )
    finally:
        torch.cuda.set_sync_debug_mode("default")


@check()
def a_captured_graph_replays(device: torch.device) -> None:
    inputs = operands(device)
    expected = step(*inputs)
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        step(*inputs)
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step(*inputs)
    graph.replay()
    assert_equal(outputs, expected)
    with torch.no_grad():
        inputs[0].mul_(0.5)
    graph.replay()
    assert_equal(outputs, step(*inputs))


@check()
def two_streams_do_not_mix(device: torch.device) -> None:
    inputs = operands(device)
    expected = step(*inputs)
    torch.cuda.synchronize(device)
    streams = [torch.cuda.Stream(device) for _ in range(2)]
    results = []
    for _ in range(10):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(step(*inputs))
    torch.cuda.synchronize(device)
    for result in results:
        assert_equal(result, expected)


@check()
def a_device_that_is_not_the_current_one(device: torch.device) -> None:
    if torch.cuda.device_count() < 2:
        raise CannotRun("one device only")
    expected = step(*operands(device))
    assert torch.cuda.current_device() == 0
    assert_equal(step(*operands(torch.device("cuda:1"))), expected)


@check()
def memory_that_runs_out_leaves_everything_usable(device: torch.device) -> None:
    inputs = operands(device)
    expected = step(*inputs)
    hidden = torch.zeros(2048, 1024, device=device, requires_grad=True)
    weight = torch.zeros(32_000, 1024, device=device, requires_grad=True)  # its gradient alone takes 125 MiB
    targets = torch.zeros(2048, dtype=torch.int64, device=device)
    torch.cuda.empty_cache()
    room = torch.cuda.memory_reserved(device) + (32 << 20)
    torch.cuda.set_per_process_memory_fraction(room / torch.cuda.get_device_properties(device).total_memory, device)
    try:
        step(hidden, weight, targets)
    except torch.OutOfMemoryError:
        pass
    else:
        raise AssertionError("the limit on the memory did not hold")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
    assert_equal(step(*inputs), expected)


@check()
def a_row_is_read_once(device: torch.device) -> None:
    """In one block, or in a cluster: where a cluster is refused the result is the same, and only the time tells."""
    if torch.cuda.get_device_capability(device)[0] not in (9, 10):
        raise CannotRun("the shared memory of other devices holds other rows")
    for vocab in (32000, 128256):
        hidden, targets = (
            torch.randn(64, D, device=device).bfloat16(),
            torch.zeros(64, dtype=torch.int64, device=device),
        )
        weight = torch.randn(vocab, D, device=device).bfloat16().requires_grad_()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            step(hidden.requires_grad_(), weight, targets)
            torch.cuda.synchronize(device)
        kernels = [event.key for event in profiler.key_averages() if "loss_rows_" in event.key]
        if not kernels:
            raise CannotRun("the profiler sees no kernels here")
        assert all("loss_rows_cached_kernel" in kernel for kernel in kernels), (vocab, kernels)


@check(part="late")
def compiled_equals_eager(device: torch.device) -> None:
    inputs = operands(device)
    try:
        compiled = torch.compile(mtp_ext.linear_cross_entropy, fullgraph=True)
        loss = compiled(*inputs)
    except RuntimeError as error:
        if "triton" in str(error).lower():
            raise CannotRun("torch.compile needs Triton here") from None
        raise
    torch.testing.assert_close(loss.detach(), step(*inputs)[0])
