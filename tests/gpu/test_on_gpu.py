"""The checks of tests/gpu under pytest; ``python -m tests.gpu.run`` runs them where there is no pytest."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.gpu import group_checks, kernel_checks, loss_checks, model_checks
from tests.gpu.registry import CannotRun, Check, all_checks
from tests.support.pretend_cuda import pretend_cuda


def test_no_check_is_lost() -> None:
    names = [check.name for check in all_checks()]
    assert len(names) == len(set(names)) > 15 and any(check.small for check in all_checks())


@pytest.mark.slow
@pytest.mark.parametrize(
    "run",
    [
        group_checks.the_stages_of_shards_equal_whole_rows,
        group_checks.a_group_of_one_equals_no_group,
        kernel_checks.decoding_of_few_rows,
        kernel_checks.decoding_with_a_large_vocabulary,
        loss_checks.every_option_and_dtype,
        loss_checks.awkward_vocabularies,
        model_checks.models_equal_the_cpu_in_float64,
        model_checks.greedy_tokens_equal_the_cpus,
        model_checks.greedy_classes_in_16_bits_equal_the_gemms,
    ],
    ids=lambda run: run.__name__,
)
def test_checks_hold_on_the_cpu(run: Callable[[torch.device], None]) -> None:
    run(torch.device("cpu"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "run",
    [
        kernel_checks.column_sums,
        kernel_checks.scaling_by_a_device_scalar,
        kernel_checks.norms_of_several_heads,
        kernel_checks.tensors_that_are_not_aligned_give_the_same,
        kernel_checks.decoding_of_few_rows,
        loss_checks.every_option_and_dtype,
        loss_checks.awkward_vocabularies,
        loss_checks.nan_in_an_ignored_row_changes_nothing,
        loss_checks.a_bound_on_the_targets_changes_no_result,
        group_checks.the_stages_of_shards_equal_whole_rows,
        loss_checks.no_target_and_no_rows,
    ],
    ids=lambda run: run.__name__,
)
def test_checks_hold_where_the_cpu_pretends(run: Callable[[torch.device], None]) -> None:
    """The path of a GPU, with torch's arithmetic in the place of the kernels: a check that is wrong fails here."""
    with pretend_cuda(may_wait=True):
        run(torch.device("cpu"))


@pytest.mark.gpu
@pytest.mark.parametrize("check", all_checks(), ids=lambda check: check.name)
def test_on_gpu(check: Check) -> None:
    try:
        check.run(torch.device("cuda:0"))
    except CannotRun as reason:
        pytest.skip(str(reason))
