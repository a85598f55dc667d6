"""The lengths that rows are padded to."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmtune.packed.length_buckets import LENGTH_STEP, MAX_LENGTHS, LengthBuckets, bucket_length


@pytest.mark.parametrize("tokens", [*range(1, 2000, 7), 4096])
def test_a_bucket_of_length_holds_the_row_and_little_more(tokens: int):
    assert tokens <= bucket_length(tokens) < tokens + max(8, tokens / 3)
    assert bucket_length(bucket_length(tokens)) == bucket_length(tokens)


def test_rows_of_one_length_are_hardly_padded():
    buckets = LengthBuckets.of_rows(np.full(100, 730))
    assert buckets.lengths == (736,)
    assert buckets(730) == 736


def test_a_round_of_few_rows_is_not_divided_into_many_packed_batches():
    tokens = np.array([720, 730, 740] * 50)
    assert LengthBuckets.of_rows(tokens).lengths == (720, 736, 752)
    assert LengthBuckets.of_rows(tokens, 16).lengths == (752,)
    assert LengthBuckets.of_rows(np.array([100, 1000] * 50), 16).lengths == (112, 1008)


def test_a_row_that_is_cut_shorter_than_every_row_is_not_padded_to_the_shortest_of_them():
    buckets = LengthBuckets.of_rows(np.array([730, 900]))
    assert buckets(100) == bucket_length(100)
    assert buckets(5000) == bucket_length(5000), "longer than every row: of another store"


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 3000), min_size=1, max_size=200))
def test_there_are_few_lengths_and_each_row_fits_one(tokens: list[int]):
    buckets = LengthBuckets.of_rows(np.array(tokens))
    assert len(buckets.lengths) <= MAX_LENGTHS
    assert list(buckets.lengths) == sorted(set(buckets.lengths))
    assert all(length <= buckets(length) <= bucket_length(length) for length in tokens)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 14 * LENGTH_STEP), min_size=1, max_size=60))
def test_no_other_lengths_give_less_padding(tokens: list[int]):
    """All choices of `MAX_LENGTHS` of at most 14 lengths are tried."""
    rows = -(-np.array(tokens) // LENGTH_STEP) * LENGTH_STEP
    ends = np.unique(rows)

    def padded(lengths: tuple[int, ...]) -> int:
        return int(np.array(lengths)[np.searchsorted(lengths, rows)].sum())

    count = min(MAX_LENGTHS, len(ends))
    choices = combinations(ends[:-1], count - 1)
    least = min(padded((*(int(end) for end in choice), int(ends[-1]))) for choice in choices)
    assert padded(LengthBuckets.of_rows(np.array(tokens)).lengths) == least
