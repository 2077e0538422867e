"""torch.compile without a graph break, the registered operators, and shapes on devices that are not there."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

import mtp_ext.ops.few_rows  # noqa: F401  (registers its fake implementation)
from mtp_ext import linear_cross_entropy, multi_token_cross_entropy
from mtp_ext.ops.common.result import RowTables
from mtp_ext.ops.loss import native_cpu, operators
from mtp_ext.ops.loss.arguments import LossCall, Needs
from mtp_ext.ops.loss.operators import arguments
from mtp_ext.ops.loss.options import RowOptions
from mtp_ext.ops.loss.row_kernels import RowScales, loss_rows_, select_rows

V = 33


def make(n: int, batch: int, seq: int, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    hidden = torch.randn(n, batch, seq, 8, device=device, requires_grad=True)
    weight = torch.randn(V, 8, device=device, requires_grad=True)
    labels = torch.randint(V, (batch, seq + n), device=device)
    return hidden, weight, torch.where(torch.rand(labels.shape, device=device) < 0.3, -100, labels)


def n_heads(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    out = multi_token_cross_entropy(hidden, weight, labels, head_weights=[1.0, 0.5], normalizer=11, softcap=4.0)
    return out.loss + 0 * out.accept_length


def head_sequence(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return multi_token_cross_entropy(list(hidden.unbind()), weight, labels, detach_weight=(1,)).loss


def rows(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    loss, lse = linear_cross_entropy(
        hidden[0], weight, labels[:, : hidden.shape[2]], reduction="none", return_lse=True, z_loss=1e-3
    )
    return loss.square().sum() + lse.sin().sum()


def one_head(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    loss = linear_cross_entropy(hidden[1], weight, labels[:, : hidden.shape[2]], label_smoothing=0.1)
    assert isinstance(loss, Tensor)
    return loss


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("function", [n_heads, head_sequence, rows, one_head])
def test_compile_full_graph(function: Callable[..., Tensor], backend: str) -> None:
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=backend)
    for seq in (5, 9):
        hidden, weight, labels = make(2, 3, seq)
        expected = function(hidden, weight, labels)
        gradients = torch.autograd.grad(expected, (hidden, weight))
        loss = compiled(hidden, weight, labels)
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
        for ours, eager in zip(torch.autograd.grad(loss, (hidden, weight)), gradients, strict=True):
            torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_a_dynamic_graph_is_compiled_once_for_all_sizes() -> None:
    counter = CompileCounter()  # type: ignore[no-untyped-call]

    @torch.compile(fullgraph=True, dynamic=True, backend=counter)
    def function(hidden: Tensor, weight: Tensor, labels: Tensor, max_valid: int) -> Tensor:
        both = multi_token_cross_entropy(hidden, weight, labels, max_valid=max_valid, chunk_rows=max_valid).loss
        return both + row_loss(hidden[0].flatten(0, 1), weight, labels[:, : hidden.shape[2]].flatten())

    def row_loss(rows: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        loss = linear_cross_entropy(rows, weight, targets)
        assert isinstance(loss, Tensor)
        return loss

    for batch, seq in ((3, 5), (3, 9), (4, 12), (2, 17)):
        function(*make(2, batch, seq), batch * seq).backward()
    assert counter.frame_count == 1


@pytest.mark.slow
def test_compile_with_a_gradient_buffer() -> None:
    hidden, weight, labels = make(2, 3, 5)

    def function(hidden: Tensor, weight: Tensor, labels: Tensor, buffer: Tensor) -> Tensor:
        return multi_token_cross_entropy(hidden, weight, labels, grad_weight_out=buffer).loss

    expected, buffer = torch.ones(V, 8), torch.ones(V, 8)
    function(hidden, weight, labels, expected).backward()
    torch.compile(function, fullgraph=True, backend="aot_eager")(hidden, weight, labels, buffer).backward()
    assert weight.grad is None
    torch.testing.assert_close(buffer, expected)


def test_compile_without_gradients_and_under_autocast() -> None:
    hidden, weight, labels = make(2, 3, 5)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def function(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return multi_token_cross_entropy(hidden, weight, labels).loss

    with torch.no_grad():
        value = function(hidden, weight, labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = multi_token_cross_entropy(hidden, weight, labels).loss
    assert torch.equal(value, expected) and not value.requires_grad


def operator_calls() -> dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """Every operator that the package registers, with arguments of a small call."""
    hidden, weight, labels = (x.detach() for x in make(2, 3, 5))
    call = LossCall(
        labels=labels,
        seq_len=5,
        n_heads=2,
        first_shift=1,
        compute_dtype=torch.float32,
        options=RowOptions(label_smoothing=0.1, z_loss=1e-3, softcap=5.0),
        bias=torch.randn(V),
        token_weights=torch.rand(labels.shape),
        chunk_rows=4,
        detach_weight=frozenset({2}),
        max_valid=[15, 14],
    )
    every, none, table = Needs(True, True, True), Needs(False, False, False), torch.rand(30)
    backward = dataclasses.replace(call, normalizer=1.0, row_scale=table, lse_grad=table)
    chosen, counts, _ = select_rows(call, V)
    chosen, ops = chosen[: int(counts.sum())], torch.ops.mtp_ext
    tables = RowTables.zeros(30, dtype=torch.float32, device=labels.device)
    native = call.pack()
    flags = native_cpu.FLAG_MEASURES + native_cpu.FLAG_HIDDEN + native_cpu.FLAG_WEIGHT + native_cpu.FLAG_BIAS
    return {
        "_multi_token_loss": (ops._multi_token_loss, arguments(call, weight, [hidden], every), {}),
        "_row_losses": (ops._row_losses, arguments(call, weight, [hidden], none), {}),
        "_row_losses_backward": (ops._row_losses_backward, arguments(backward, weight, [hidden], every), {}),
        "_add_scaled_": (ops._add_scaled_, (torch.ones(V, 8), weight, torch.tensor(2.0)), {}),
        "_fused_loss_": (
            ops._fused_loss_,
            (
                *(list(hidden), weight, native.tensors, native.options, native.sizes + native.detach_weight),
                *(torch.float32, flags, []),
            ),
            {},
        ),
        "_few_rows": (ops._few_rows, (torch.randn(3, 8), weight.detach()), {}),
        "_select_rows": (ops._select_rows, (labels, None, None, 2, 5, 1, -100, V, True), {}),
        "_loss_rows_": (
            ops._loss_rows_,
            (
                *(torch.randn(len(chosen), V), chosen, labels, [torch.ones(2), *[None] * 6], [0.0, 0.0, 0.0, 1.0]),
                *(float(V), [5, 1, 0, V], True, list(tables), "whole", []),
            ),
            {},
        ),
    }


def registered() -> set[str]:
    """The operators that run here: some have a CUDA kernel alone."""
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("mtp_ext::")]
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    keys = ("CPU", "CompositeExplicitAutograd")
    return {name.removeprefix("mtp_ext::") for name in names if any(has(name, key) for key in keys)}


def test_every_operator_is_checked() -> None:
    assert registered() == set(operator_calls())


@pytest.mark.parametrize("name", sorted(operator_calls()))
def test_opcheck(name: str) -> None:
    operator, args, kwargs = operator_calls()[name]
    utilities = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic", "test_autograd_registration")
    if name == "_fused_loss_":  # called by the operators' bodies alone, and never seen by a compiler
        utilities = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(operator.default, args, kwargs, test_utils=utilities)


@pytest.mark.parametrize("name", ["_multi_token_loss", "_row_losses"])
def test_opcheck_of_operators_with_an_autograd_formula(name: str) -> None:
    operator, (hidden, weight, bias, *rest), _ = operator_calls()[name]
    leaves = [x.requires_grad_() for x in (*hidden, weight, bias)]
    rest[-1] = Needs(True, True, True)
    utilities = ("test_schema", "test_faketensor", "test_autograd_registration")  # "aot_dispatch" would differentiate
    torch.library.opcheck(operator.default, ([leaves[0]], *leaves[1:], *rest), test_utils=utilities)  # the gradients


def test_a_raw_operator_is_differentiable() -> None:
    operator, (hidden, weight, bias, *rest), _ = operator_calls()["_multi_token_loss"]
    leaves = [x.requires_grad_() for x in (*hidden, weight, bias)]
    result, saved = operator([leaves[0]], *leaves[1:], *rest)
    found = torch.autograd.grad(3 * result[0], leaves)
    for grad, one in zip(found, (saved[2], *saved[:2]), strict=True):
        torch.testing.assert_close(grad, 3 * one.detach())


@pytest.mark.parametrize("name", ["_multi_token_loss", "_row_losses"])
def test_a_gradient_that_was_not_asked_for_is_an_error(name: str) -> None:
    operator, (hidden, weight, *rest), _ = operator_calls()[name]
    out = operator(hidden, weight.requires_grad_(), *rest[:-1], Needs(hidden=True, weight=False, bias=False))
    loss = out[0][0] if name == "_multi_token_loss" else out[0]
    with pytest.raises(RuntimeError, match="no gradient for an argument that requires one"):
        loss.sum().backward()


def fake(x: Any) -> Any:
    """``x`` on a GPU, in shape only."""
    if isinstance(x, list):
        return [fake(y) for y in x]
    return torch.empty(x.shape, dtype=x.dtype, device="cuda") if isinstance(x, Tensor) else x


def test_fake_cuda_tensors_trace_without_a_gpu() -> None:
    hidden, weight, labels = make(2, 3, 5)
    with FakeTensorMode(), torch.no_grad():
        h, w, y = fake(hidden), fake(weight), fake(labels)
        out = multi_token_cross_entropy(h, w, y, softcap=3.0, document_ids=y)
        per_row = multi_token_cross_entropy(h, w, y, reduction="none").loss
        one = linear_cross_entropy(h, w, y.narrow(1, 0, 5).expand(2, 3, 5))
    assert all(x.device.type == "cuda" for x in (*out, per_row, one))
    assert [x.shape for x in out] == [(), (2,), (2,), (2,), ()] and per_row.shape == (2, 3, 5) and one.shape == ()


@pytest.mark.parametrize("name", ["_multi_token_loss", "_row_losses", "_row_losses_backward"])
def test_fake_cuda_operators_have_the_real_shapes(name: str) -> None:
    operator, args, kwargs = operator_calls()[name]
    real = tree_leaves(operator(*args, **kwargs))
    with FakeTensorMode():
        faked = tree_leaves(operator(*(fake(x) for x in args), **kwargs))
    assert [(x.shape, x.dtype) for x in faked] == [(x.shape, x.dtype) for x in real]
    assert all(x.device.type == "cuda" for x in faked)


def test_fake_select_rows_and_loss_rows() -> None:
    with FakeTensorMode():
        labels = torch.zeros(3, 7, dtype=torch.int64, device="cuda")
        call = LossCall(labels, 5, 2, 1, torch.float32)
        chosen, counts, first = select_rows(call, V)
        assert (chosen.shape, counts.shape, first.shape) == ((30,), (2,), (1,))
        tables = RowTables.zeros(30, dtype=torch.float32, device=labels.device)
        scales = RowScales(torch.ones(2, device="cuda"), class_weight_sum=float(V))
        loss_rows_(torch.empty(30, V, device="cuda"), chosen, call, scales, tables, write_gradient=True)


def test_the_operators_are_those_of_the_library() -> None:
    """A public function and the compiled graph run the same code."""
    assert operators._multi_token_loss._opoverload is torch.ops.mtp_ext._multi_token_loss.default
