"""Which rows go through the model together."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_kit import row_of

from vlmtune.data.encoded_example import IGNORED
from vlmtune.data.input_format import InputFormat
from vlmtune.packed.length_buckets import LengthBuckets
from vlmtune.packed.packed_batch import (
    ROW_BUCKETS,
    batch_sizes,
    bucket_rows,
    make_batch,
    packed_batches,
    second_shape_fraction,
)


@pytest.mark.parametrize("rows", range(1, ROW_BUCKETS[-1] + 1))
def test_a_bucket_of_rows_holds_them_and_little_more(rows: int):
    assert rows <= bucket_rows(rows) <= rows * 4 / 3 + 1
    assert bucket_rows(bucket_rows(rows)) == bucket_rows(rows)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(1, 700), st.booleans()), min_size=1, max_size=80),
    st.integers(1, 4000),
)
def test_passes_hold_every_row_once_and_no_row_pays_for_a_longer_one(
    drawn: list[tuple[int, int, bool]], tokens: int
):
    rows = [row_of(str(slot), length, image=image) for slot, length, image in sorted(drawn)]
    buckets = LengthBuckets.of_rows(np.array([length for _, length, _ in drawn]))
    passes = list(packed_batches(rows, tokens, buckets))
    assert sorted(id(one) for part in passes for one in part) == sorted(map(id, rows))
    for part in passes:
        lengths = {buckets(len(one.example.input_ids)) for one in part}
        assert len(lengths) == len({one.has_image for one in part}) == 1
        assert len(part) == 1 or bucket_rows(len(part)) * lengths.pop() <= tokens
        slots = [one.slot for one in part]
        assert slots == sorted(slots), "rows of one trial stand together"


def test_rows_are_divided_evenly():
    rows = [row_of(str(slot), 300) for slot in range(16)]
    parts = packed_batches(rows, 13 * 304, LengthBuckets((304,)))
    assert [len(part) for part in parts] == [8, 8]
    assert batch_sizes(16, 13) == (8, 6, 4, 3, 2, 1)
    assert batch_sizes(14, 7) == (6, 4, 3, 2, 1)
    assert batch_sizes(14, 8) == (8, 6, 4, 3, 2, 1)


def test_rows_of_one_length_need_memory_for_batches_of_fewer_rows_only():
    assert second_shape_fraction(8, LengthBuckets((736,))) == 6 / 8
    assert second_shape_fraction(8, LengthBuckets((640, 736))) == 1
    assert second_shape_fraction(1, LengthBuckets((736,))) == 1


def test_a_batch_is_filled_up_with_rows_that_count_nothing():
    meta = SimpleNamespace(pad_token_id=0, input_format=InputFormat())
    rows = [row_of("a", 20), row_of("a", 30), row_of("b", 17), row_of("b", 18), row_of("c", 25)]
    batch = make_batch(rows, 32, meta, torch.device("cpu"), torch.float32)
    assert batch["input_ids"].shape == (6, 32)
    assert (batch["labels"] != IGNORED).sum(1).tolist() == [1, 1, 1, 1, 1, 0]
    assert batch["attention_mask"].sum(1).tolist() == [20, 30, 17, 18, 25, 25]
