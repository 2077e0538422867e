"""The order of rows: deterministic, resumable to the batch, the same for any number of ranks."""

from __future__ import annotations

import json
from itertools import islice, pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mtp_ext.train.data import Batch, TrainingStream, evaluation_batches
from tests.train.test_data_packing import dataset_of, expected_targets, targets

DATASET = dataset_of([5, 1, 9, 20, 1, 1, 30])  # 67 tokens


def stream(batch_size: int = 3, seed: int = 0, seq_len: int = 4, rank: int = 0, world_size: int = 1) -> TrainingStream:
    return TrainingStream(DATASET, "train", seq_len, 2, batch_size, seed, rank=rank, world_size=world_size)


def take(batches: TrainingStream, count: int) -> list[Batch]:
    return list(islice(batches, count))


def first_tokens(batches: list[Batch]) -> list[int]:
    tokens: list[int] = torch.cat([batch.tokens[:, 0] for batch in batches]).tolist()
    return tokens


def same(a: list[Batch], b: list[Batch]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x, y) for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True)
    )


@given(st.integers(0, 30), st.integers(1, 30), st.integers(1, 40), st.integers(0, 3))
def test_resuming_equals_never_stopping(before: int, after: int, batch_size: int, seed: int) -> None:
    whole = take(stream(batch_size, seed), before + after)
    stopped = stream(batch_size, seed)
    take(stopped, before)
    state = json.loads(json.dumps(stopped.state_dict()))
    resumed = stream(batch_size, seed)
    take(resumed, 2)
    resumed.load_state_dict(state)
    assert same(take(resumed, after), whole[before:])


@given(st.integers(1, 5), st.sampled_from([1, 2, 3, 4]), st.integers(1, 12))
def test_ranks_share_each_batch(share: int, world_size: int, count: int) -> None:
    batch_size = share * world_size
    whole = take(stream(batch_size), count)
    ranks = [take(stream(batch_size, rank=rank, world_size=world_size), count) for rank in range(world_size)]
    joined = [Batch(*(torch.cat(parts) for parts in zip(*shares, strict=True))) for shares in zip(*ranks, strict=True)]
    assert same(joined, whole)


@given(st.integers(1, 40), st.integers(1, 9))
def test_each_epoch_is_another_order_of_all_rows(batch_size: int, seq_len: int) -> None:
    batches = stream(batch_size, seq_len=seq_len)
    rows = batches.rows_per_epoch
    taken = take(batches, rows)  # batch_size epochs, whether or not it divides the rows
    assert all(batch.tokens.shape == (batch_size, seq_len) for batch in taken)
    assert batches.epochs == batch_size
    firsts = first_tokens(taken)
    epochs = [firsts[i : i + rows] for i in range(0, len(firsts), rows)]
    assert all(sorted(epoch) == list(range(0, 67, seq_len)) for epoch in epochs)
    assert rows < 10 or all(a != b for a, b in pairwise(epochs))


def test_an_epoch_trains_every_target_once() -> None:
    batches = stream(batch_size=1)
    found = [target for batch in take(batches, batches.rows_per_epoch) for target in targets(batch)]
    assert sorted(found) == expected_targets([5, 1, 9, 20, 1, 1, 30], 2)


def test_the_rows_depend_on_the_seed_alone() -> None:
    assert first_tokens(take(stream(4), 6)) == first_tokens(take(stream(3), 8))
    assert first_tokens(take(stream(4), 6)) != first_tokens(take(stream(4, seed=1), 6))


def test_a_batch_size_may_change_on_resuming() -> None:
    whole = first_tokens(take(stream(2), 30))
    stopped = stream(2)
    head = first_tokens(take(stopped, 15))
    resumed = stream(5)
    resumed.load_state_dict(stopped.state_dict())
    assert head + first_tokens(take(resumed, 6)) == whole


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 7}, "seed of the data order is 0, but the state to resume has 7"),
        ({"seq_len": 8}, "seq_len of the data order is 4, but the state to resume has 8"),
        ({"dataset": "other"}, "dataset of the data order is 'fingerprint', but the state to resume has 'other'"),
        ({"index": 17}, "not a position in the data order: epoch 0, index 17"),
    ],
)
def test_the_state_of_another_order_is_rejected(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stream().load_state_dict({**stream().state_dict(), **change})


@given(st.integers(1, 9), st.integers(1, 4), st.integers(1, 20))
def test_evaluation_reads_every_row_once_in_order(seq_len: int, n_future: int, batch_size: int) -> None:
    batches = list(evaluation_batches(DATASET, "train", seq_len, n_future, batch_size))
    assert first_tokens(batches) == list(range(0, 67, seq_len))
    assert all(batch.tokens.shape[0] == batch_size for batch in batches[:-1])
    found = [target for batch in batches for target in targets(batch)]
    assert sorted(found) == expected_targets([5, 1, 9, 20, 1, 1, 30], n_future)


@pytest.mark.parametrize(
    ("max_tokens", "rows"), [(1, [0]), (4, [0]), (16, [0, 4, 8, 12]), (20, [0, 3, 6, 10, 13]), (10**9, list(range(17)))]
)
def test_a_part_of_the_split_is_spread_over_it(max_tokens: int, rows: list[int]) -> None:
    batches = list(evaluation_batches(DATASET, "train", 4, 2, 3, max_tokens=max_tokens))
    assert first_tokens(batches) == [4 * row for row in rows]


def test_wrong_sizes_are_named() -> None:
    def build(**changed: Any) -> TrainingStream:
        sizes = {"split": "train", "seq_len": 2, "n_future": 2, "batch_size": 2, "seed": 0}
        return TrainingStream(DATASET, **{**sizes, **changed})

    for name in ("seq_len", "n_future", "batch_size"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            build(**{name: 0})
    with pytest.raises(ValueError, match="batch_size must be a multiple of world_size 2, got 3"):
        build(batch_size=3, world_size=2)
    with pytest.raises(ValueError, match="rank must be in"):
        build(rank=1)
    with pytest.raises(ValueError, match="seed must be a non-negative"):
        build(seed=-1)
    with pytest.raises(ValueError, match="split must be 'train' or 'validation', got 'test'"):
        build(split="test")
    with pytest.raises(ValueError, match="the validation split is empty"):
        evaluation_batches(DATASET, "validation", 4, 2, 3)
    with pytest.raises(ValueError, match="max_tokens must be at least 1"):
        evaluation_batches(DATASET, "train", 4, 2, 3, max_tokens=0)
