"""Which rows go through the model together."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_kit import row_of

from vlmtune.data.encoded_example import IGNORED
from vlmtune.data.input_format import InputFormat
from vlmtune.packed.packed_batch import ROW_BUCKETS, bucket_length, bucket_rows, make_batch, packed_batches


@pytest.mark.parametrize("tokens", [*range(1, 2000, 7), 4096])
def test_a_bucket_of_length_holds_the_row_and_little_more(tokens: int):
    assert tokens <= bucket_length(tokens) < tokens + max(8, tokens / 3)
    assert bucket_length(bucket_length(tokens)) == bucket_length(tokens)


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
    rows = [row_of(str(owner), length, image=image) for owner, length, image in sorted(drawn)]
    passes = list(packed_batches(rows, tokens))
    assert sorted(id(one) for part in passes for one in part) == sorted(map(id, rows))
    for part in passes:
        lengths = {bucket_length(len(one.example.input_ids)) for one in part}
        assert len(lengths) == len({one.has_image for one in part}) == 1
        assert len(part) == 1 or bucket_rows(len(part)) * lengths.pop() <= tokens
        owners = [one.owner for one in part]
        assert owners == sorted(owners), "rows of one trial stand together"


def test_a_batch_is_filled_up_with_rows_that_count_nothing():
    meta = SimpleNamespace(pad_token_id=0, inputs=InputFormat())
    rows = [row_of("a", 20), row_of("a", 30), row_of("b", 17), row_of("b", 18), row_of("c", 25)]
    batch = make_batch(rows, meta, torch.device("cpu"), torch.float32)
    assert batch["input_ids"].shape == (6, 32)
    assert (batch["labels"] != IGNORED).sum(1).tolist() == [1, 1, 1, 1, 1, 0]
    assert batch["attention_mask"].sum(1).tolist() == [20, 30, 17, 18, 25, 25]
