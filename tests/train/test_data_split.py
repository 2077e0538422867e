"""The held-out split."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtp_ext.train.data.split import choose_validation, hash_group


def choose(groups: list[str], sizes: list[int], fraction: float, seed: int = 0) -> list[bool]:
    hashes = np.array([hash_group(group, seed) for group in groups], dtype=np.uint64)
    held_out: list[bool] = choose_validation(hashes, np.array(sizes, dtype=np.int64), fraction).tolist()
    return held_out


documents = st.lists(st.tuples(st.sampled_from("abcdefghij"), st.integers(1, 100)), min_size=2, max_size=40)


@given(documents, st.floats(0.01, 0.99), st.integers(0, 5), st.randoms())
def test_groups_stay_together_and_no_side_is_empty(
    items: list[tuple[str, int]], fraction: float, seed: int, random: object
) -> None:
    groups, sizes = [group for group, _ in items], [size for _, size in items]
    if len(set(groups)) < 2:
        with pytest.raises(ValueError, match=r"single unit .* nothing can be held out"):
            choose(groups, sizes, fraction, seed)
        return
    held_out = choose(groups, sizes, fraction, seed)
    assert any(held_out) and not all(held_out)
    side = dict(zip(groups, held_out, strict=True))
    assert [side[group] for group in groups] == held_out
    backwards = choose(groups[::-1], sizes[::-1], fraction, seed)
    assert backwards == held_out[::-1], "the order of the documents does not matter"


@given(st.floats(0.05, 0.95), st.integers(0, 100))
def test_the_share_of_bytes_is_met(fraction: float, seed: int) -> None:
    held_out = choose([str(i) for i in range(200)], [10] * 200, fraction, seed)
    assert abs(sum(held_out) / 200 - fraction) <= 1 / 200 + 1e-9


def test_one_huge_group_stays_in_training() -> None:
    groups, sizes = [str(i) for i in range(50)], [1000] + [10] * 49
    for seed in range(20):
        assert not choose(groups, sizes, 0.1, seed)[0]


def test_no_group_makes_up_the_validation_set_where_others_fill_it() -> None:
    groups, sizes = [str(i) for i in range(201)], [95] + [10] * 200
    for seed in range(20):
        assert not choose(groups, sizes, 0.05, seed)[0]


def test_few_files_hold_out_the_smallest() -> None:
    assert choose(["a", "b", "c"], [30, 20, 40], 0.05) == [False, True, False]


def test_zero_and_one_put_everything_on_one_side() -> None:
    assert choose(["a", "b"], [1, 1], 0.0) == [False, False]
    assert choose(["a", "b"], [1, 1], 1.0) == [True, True]


def test_the_seed_decides() -> None:
    groups, sizes = [str(i) for i in range(100)], [10] * 100
    assert choose(groups, sizes, 0.1, 0) == choose(groups, sizes, 0.1, 0)
    assert choose(groups, sizes, 0.1, 0) != choose(groups, sizes, 0.1, 1)
