"""The Python code that only runs on a GPU, on a CPU whose tensors say that they are on one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given
from torch.utils._python_dispatch import TorchDispatchMode

from mtp_ext.ops import linear_cross_entropy, multi_token_cross_entropy
from mtp_ext.ops.top_classes import top_classes
from tests.gpu.model_checks import VOCAB, gradients, make_model
from tests.support.accuracy import assert_accurate
from tests.support.drawn_calls import calls
from tests.support.loss_calls import Call, run
from tests.support.pretend_cuda import pretend_cuda


@pytest.mark.slow
@given(calls())
def test_any_call(call: Call) -> None:
    """16-bit logits are held in 16 bits, also where the CPU would hold them in float32."""
    assume(call.dtype != torch.float64)
    with pretend_cuda():
        ours = run(call, call.dtype, ours=True)
    assert_accurate(call, ours, logits_dtype=call.dtype)


def test_head_weights_that_are_numbers_have_a_backward() -> None:
    """They are held in float64, and their gradient, which nobody wants, was asked of a kernel that has no float64."""
    leaves = [torch.randn(2, 1, 4, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)]
    arguments = (torch.randint(11, (1, 6)), [1.0, 0.5])

    def grads() -> tuple[torch.Tensor, ...]:
        loss = multi_token_cross_entropy(*leaves, arguments[0], head_weights=arguments[1]).loss
        return torch.autograd.grad(loss, leaves)

    expected = grads()
    with pretend_cuda():
        found = grads()
    torch.testing.assert_close(found, expected)


def test_a_sum_into_a_buffer() -> None:
    hidden, weight = torch.randn(9, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
    buffers = [torch.full((11, 8), 3.0) for _ in range(2)]
    targets = torch.randint(11, (9,))
    linear_cross_entropy(hidden, weight, targets, grad_weight_out=buffers[0]).backward()
    with pretend_cuda():
        linear_cross_entropy(hidden, weight, targets, grad_weight_out=buffers[1], chunk_rows=4).backward()
    torch.testing.assert_close(*buffers)


@pytest.mark.parametrize("schedule", ["sequential", "joint"])
@pytest.mark.parametrize("variant", ["parallel", "linear", "replicated", "causal", "sequential_modules", "shared"])
def test_a_models_step(variant: str, schedule: str) -> None:
    model = make_model(torch.device("cpu"), variant=variant)
    expected = gradients(model, "autograd")
    with pretend_cuda():
        found = gradients(model, schedule)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).abs().max() <= 1e-5 + 1e-4 * theirs.abs().max()


@pytest.mark.parametrize("normalizer", ["per_head", 7.0])
def test_the_heads_of_one_row_look_at_no_target(normalizer: str | float) -> None:
    """An invalid target must not index the unembedding: on a GPU the failed assertion would end the process."""
    model = make_model(torch.device("cpu"), variant="shared")
    labels = torch.randint(VOCAB, (2, 12))
    expected = model(labels[:, :9], labels, normalizer=normalizer).loss
    with pretend_cuda():
        found = model(labels[:, :9], labels, normalizer=normalizer).loss
        labels[1, 4] = VOCAB
        bad = model(labels[:, :3], labels, normalizer=normalizer).loss
    torch.testing.assert_close(found, expected)
    assert bad.isnan()


@pytest.mark.parametrize("rows", [3, 65])
def test_decoding(rows: int) -> None:
    hidden, weight = torch.randn(rows, 16, dtype=torch.bfloat16), torch.randn(50, 16, dtype=torch.bfloat16)
    expected = top_classes(hidden.float(), weight.float(), 1)
    with pretend_cuda():
        found = top_classes(hidden, weight, 1)
    assert found.ids.shape == (rows, 1) and found.ids.dtype == torch.int64
    torch.testing.assert_close(found.logits, expected.logits, rtol=0.01, atol=0.01)


class _BeforeProduct(TorchDispatchMode):
    """Records the operators that run before the first matrix product, views and allocations apart."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self._found = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._found = self._found or func in (torch.ops.aten.mm.out, torch.ops.aten.addmm.out)
        if not self._found and not func.is_view and "empty" not in str(func) and "detach" not in str(func):
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "z_loss": 1e-3}, {"softcap": 5.0}], ids=str)
def test_a_gpu_multiplies_before_the_host_prepares_the_rest(options: dict[str, float]) -> None:
    """Rows are selected and gathered, and the first product is launched: weights, divisors and tables come later."""
    hidden, weight = (torch.randn(n, 16, dtype=torch.bfloat16, requires_grad=True) for n in (40, 50))
    targets = torch.randint(50, (40,))
    with pretend_cuda(), _BeforeProduct() as before:
        linear_cross_entropy(hidden, weight, targets, **options)
    assert before.names == ["mtp_ext::_select_rows", "aten::ge.Scalar", "aten::new_zeros", "aten::where.self_out"]


def test_what_would_make_the_host_wait_raises() -> None:
    x = torch.ones(2, requires_grad=True)

    def in_backward() -> None:
        y = x * 2
        y.register_hook(lambda grad: grad * float(grad[0]))
        y.sum().backward()

    waits = (
        lambda: x[0].item(),
        lambda: x.detach().tolist(),
        lambda: bool(x[0] > 0),
        lambda: x.nonzero(),
        lambda: torch.tensor([1], device=x.device),
        in_backward,
    )
    for wait in waits:
        wait()
        with pretend_cuda(), pytest.raises(AssertionError, match="wait"):
            wait()
