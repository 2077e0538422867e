"""The cases of torch's own suites (OpInfo) for the losses that these are equal to.

docs/internals/numerics.md says how many cases there are, and which of them the losses do not have.
"""

from __future__ import annotations

import functools
from collections import Counter
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mtp_ext.ops import linear_cross_entropy, multi_token_cross_entropy

TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2}
HAS_LINEAR = pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="torch 2.13 or newer has the function")
SUITES = ["cross_entropy", pytest.param("linear_cross_entropy", marks=HAS_LINEAR)]


class Case(NamedTuple):
    """A call of ``F.linear_cross_entropy`` that a loss of one head can make."""

    hidden: Tensor  # [..., D]
    weight: Tensor  # [C, D]
    targets: Tensor  # [...]
    options: dict[str, Any]


@functools.cache
def op_infos(suite: str) -> list[Any]:
    from torch.testing._internal.common_methods_invocations import op_db

    return [info for info in op_db if info.name == f"nn.functional.{suite}"]


def case_of(suite: str, sample: Any) -> Case | str:
    """Returns a sample of a suite as a call of the loss, or why it is none."""
    options = {name: x for name, x in sample.kwargs.items() if name != "options"}  # how torch divides it into chunks
    if suite == "cross_entropy":
        hidden, (targets,) = sample.input, sample.args
        if hidden.dim() > 1:
            hidden = hidden.movedim(1, -1)
        weight = torch.eye(hidden.shape[-1], dtype=hidden.dtype)
    else:
        hidden, weight, targets = sample.input, *sample.args
    if targets.is_floating_point():
        return "targets are probabilities"
    if weight.dim() != 2:
        return "several unembeddings in one call"
    if options.get("ignore_index", 0) is None:
        del options["ignore_index"]
    renamed = {"weight": "class_weights", "linear_bias": "bias"}
    return Case(hidden, weight, targets, {renamed.get(name, name): x for name, x in options.items()})


@functools.cache
def cases(suite: str, dtype: torch.dtype) -> tuple[list[Case], Counter[str]]:
    """Returns the cases of a suite, and how many samples are none for which reason."""
    samples = [x for info in op_infos(suite) for x in info.sample_inputs("cpu", dtype)]
    found = [case_of(suite, x) for x in samples]
    return [x for x in found if isinstance(x, Case)], Counter(x for x in found if isinstance(x, str))


def expected_of(case: Case) -> list[Tensor]:
    """Loss and gradients in float64; a mean without targets is 0 instead of NaN."""
    hidden, weight = (x.detach().double().requires_grad_() for x in (case.hidden, case.weight))
    options = {name: x.double() if isinstance(x, Tensor) else x for name, x in case.options.items()}
    logits = F.linear(hidden, weight, options.pop("bias", None))
    options["weight"] = options.pop("class_weights", None)
    classes = logits if logits.dim() == 1 else logits.movedim(-1, 1)
    loss = F.cross_entropy(classes, case.targets.long(), **options)
    return [x.nan_to_num() for x in (loss, *torch.autograd.grad(loss.sum(), (hidden, weight)))]


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("suite", SUITES)
def test_samples(suite: str, dtype: torch.dtype) -> None:
    found, _ = cases(suite, dtype)
    assert len(found) > 10
    for case in found:
        hidden, weight = (x.detach().requires_grad_() for x in (case.hidden, case.weight))
        loss = linear_cross_entropy(hidden, weight, case.targets, **case.options)
        assert isinstance(loss, Tensor)
        ours = (loss, *torch.autograd.grad(loss.sum(), (hidden, weight)))
        for x, right in zip(ours, expected_of(case), strict=True):
            torch.testing.assert_close(x.double(), right, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("suite", SUITES)
def test_samples_as_heads(suite: str, dtype: torch.dtype) -> None:
    """The first of two heads, the second of which has weight 0."""
    for case in cases(suite, dtype)[0]:
        hidden = case.hidden.detach().reshape(1, -1, case.weight.shape[1])
        ignored = case.options.get("ignore_index", -100)
        labels = F.pad(case.targets.reshape(1, -1), (1, 0), value=ignored)  # head 1 reads the next label
        out = multi_token_cross_entropy([hidden, hidden], case.weight, labels, head_weights=[1.0, 0.0], **case.options)
        loss = out.loss[0] if case.options.get("reduction") == "none" else out.loss
        right = expected_of(case)[0].reshape(loss.shape)
        torch.testing.assert_close(loss.detach().double(), right, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])


@HAS_LINEAR
def test_error_inputs() -> None:
    """What torch refuses is refused here: their targets are probabilities, in place of which class 0 is taken."""
    refused = 0
    for info in op_infos("linear_cross_entropy"):
        for error in info.error_inputs("cpu"):
            sample = error.sample_input
            weight, targets = sample.args[0], torch.zeros(sample.input.shape[:-1], dtype=torch.int64)
            if weight.dim() > 2 or sample.input.dim() > 2 or sample.kwargs.get("ignore_index") is not None:
                continue  # several unembeddings; three dimensions are none too many; only probabilities ignore nothing
            with pytest.raises(ValueError, match=r"weight must be \[V, D\]|bias must have shape"):
                linear_cross_entropy(sample.input, weight, targets, bias=sample.kwargs.get("linear_bias"))
            refused += 1
    assert refused == 3 * len(op_infos("linear_cross_entropy"))
