"""Packing: nothing is lost, nothing is seen twice, and nothing leaks from one document into another."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtp_ext.train.data import IGNORE_INDEX, Batch, ByteTokenizer, Dataset, TokenSplit
from mtp_ext.train.data.packing import n_rows, pack

PAD = 10**6
Target = tuple[int, int, int]  # head, input token, target token


def split_of(lengths: list[int], shard_tokens: int = 10**6) -> TokenSplit:
    """Documents whose ids are their positions in the split, so that an id says where it comes from."""
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    ids = np.arange(starts[-1], dtype=np.uint32)
    shards = tuple(ids[i : i + shard_tokens] for i in range(0, ids.size, shard_tokens))
    return TokenSplit("train", shards, starts, n_bytes=int(starts[-1]))


def dataset_of(lengths: list[int]) -> Dataset:
    return Dataset(ByteTokenizer(), {}, "fingerprint", {"train": split_of(lengths)})


def all_rows(split: TokenSplit, seq_len: int, n_future: int) -> Batch:
    return pack(split, np.arange(n_rows(split, seq_len)), seq_len, n_future, PAD)


def targets(batch: Batch) -> list[Target]:
    """Every target that counts by the rule of the fused loss (docs/internals/architecture.md)."""
    seq_len = batch.tokens.shape[1]
    found = []
    for tokens, labels, documents in zip(*(part.tolist() for part in batch), strict=True):
        for position in range(seq_len):
            for head in range(1, len(labels) - seq_len + 1):
                target = position + head
                if labels[target] != IGNORE_INDEX and documents[target] == documents[position]:
                    found.append((head, tokens[position], labels[target]))
    return sorted(found)


def expected_targets(lengths: Iterable[int], n_future: int) -> list[Target]:
    found, start = [], 0
    for length in lengths:
        for head in range(1, n_future + 1):
            found += [(head, j - head, j) for j in range(start + head, start + length)]
        start += length
    return sorted(found)


corpora = st.lists(st.integers(1, 12), min_size=1, max_size=12)
shard_sizes = st.sampled_from([10**6, 1, 2, 5, 16])


@given(corpora, st.integers(1, 9), st.integers(1, 5), shard_sizes)
def test_every_target_counts_once_and_none_crosses_a_boundary(
    lengths: list[int], seq_len: int, n_future: int, shard_tokens: int
) -> None:
    batch = all_rows(split_of(lengths, shard_tokens), seq_len, n_future)
    assert targets(batch) == expected_targets(lengths, n_future)


@given(corpora, st.integers(1, 9), st.integers(1, 5), shard_sizes)
def test_every_token_is_an_input_once(lengths: list[int], seq_len: int, n_future: int, shard_tokens: int) -> None:
    split = split_of(lengths, shard_tokens)
    tokens, labels, documents = (part.numpy() for part in all_rows(split, seq_len, n_future))
    assert tokens.shape == (n_rows(split, seq_len), seq_len)
    assert labels.shape == documents.shape == (tokens.shape[0], seq_len + n_future)
    padding = tokens.size - split.n_tokens
    assert tokens.ravel().tolist() == [*range(split.n_tokens), *[PAD] * padding]
    real = labels[:, :seq_len] != IGNORE_INDEX
    assert (labels[:, :seq_len] == tokens)[real].all() and (~real).sum() == padding
    # Ids in a row: from 0, one more at each boundary; behind the end, one that no token has.
    assert (documents[:, 0] == 0).all()
    assert set(np.diff(documents).ravel().tolist()) <= {0, 1}
    for row_labels, row_documents in zip(labels, documents, strict=True):
        assert not set(row_documents[row_labels == IGNORE_INDEX]) & set(row_documents[row_labels != IGNORE_INDEX])


def test_a_row_by_hand() -> None:
    batch = pack(split_of([3, 1, 2]), np.array([1]), 4, 3, PAD)
    assert batch.tokens.tolist() == [[4, 5, PAD, PAD]]
    assert batch.labels.tolist() == [[4, 5, *[IGNORE_INDEX] * 5]]
    assert batch.document_ids.tolist() == [[0, 0, 1, 1, 1, 1, 1]]
    batch = pack(split_of([3, 1, 2]), np.array([0]), 4, 2, PAD)
    assert batch.labels.tolist() == [[0, 1, 2, 3, 4, 5]]
    assert batch.document_ids.tolist() == [[0, 0, 0, 1, 2, 2]]


@given(corpora, shard_sizes, st.integers(0, 150), st.integers(0, 150))
def test_reading_across_shards(lengths: list[int], shard_tokens: int, start: int, length: int) -> None:
    split = split_of(lengths, shard_tokens)
    start %= split.n_tokens
    assert split.read(start, start + length + 1).tolist() == list(range(split.n_tokens))[start : start + length + 1]
    for index in range(split.n_documents):
        first, last = split.document_starts[index], split.document_starts[index + 1]
        assert split.document(index).tolist() == list(range(first, last))
    with pytest.raises(ValueError, match="index must be in"):
        split.document(split.n_documents)
