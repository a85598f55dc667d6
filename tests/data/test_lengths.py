"""Which training rows fit a `max_length`, and what an epoch then trains on."""

import numpy as np
import pytest

from vlmtune.data.encoded_example import shorten
from vlmtune.data.lengths import fitting_rows, length_problem, trained_tokens
from vlmtune.data.split import TRAIN
from vlmtune.data.store import Store
from vlmtune.errors import DataError

pytestmark = pytest.mark.timeout(180)


@pytest.mark.parametrize("limit", [25, 32, 40, 100, None])
def test_trained_tokens_are_those_that_shortening_leaves(faulty_store: Store, limit: int | None) -> None:
    rows = faulty_store.rows_of(TRAIN)
    rows = rows[faulty_store.column("required")[rows] <= (limit or np.inf)]
    expected = sum(
        int((shorten(example, limit).labels >= 0).sum()) for example in faulty_store.read(rows.tolist())
    )
    assert trained_tokens(faulty_store, rows, limit) == expected
    assert len(rows) > 10


def test_what_is_left_to_train_on(faulty_store: Store) -> None:
    train, required = faulty_store.rows_of(TRAIN), faulty_store.column("required")
    longest = int(required[train].max())
    assert fitting_rows(faulty_store, None, "error").tolist() == list(range(len(train)))
    assert fitting_rows(faulty_store, longest, "error").tolist() == list(range(len(train)))
    left = train[fitting_rows(faulty_store, longest - 1, "skip")]
    assert left.tolist() == [row for row in train if required[row] < longest]
    with pytest.raises(
        DataError, match=f"1 of {len(train)} training rows do not fit max_length {longest - 1}"
    ):
        fitting_rows(faulty_store, longest - 1, "error")


def test_no_row_is_left_to_train_on(faulty_store: Store) -> None:
    problem = length_problem(faulty_store, 2, "skip")
    rows = len(faulty_store.rows_of(TRAIN))
    assert problem is not None and problem.startswith(
        f"{rows} of {rows} training rows do not fit max_length 2 "
    )
    assert "on_long_row" not in problem
    assert f"; and {rows - 3} more" in problem
