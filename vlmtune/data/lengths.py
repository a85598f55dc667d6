"""Whether the training rows fit `max_length`, and how much of them is trained on. Reads the index only."""

import numpy as np

from vlmtune.data.split import TRAIN
from vlmtune.data.store import Store
from vlmtune.errors import DataError

SHOWN = 3  # rows named in a message


def length_problem(store: Store, max_length: int | None, on_long_row: str) -> str | None:
    """Why the training rows cannot be cut to `max_length`, in one line with the way out; None if they can,
    or may be left out."""
    rows, long = store.rows_of(TRAIN), rows_too_long(store, max_length)
    if not len(long) or (on_long_row == "skip" and len(long) < len(rows)):
        return None
    other = ", --on_long_row skip leaves them out" if len(long) < len(rows) else ""
    return (
        f"{len(long)} of {len(rows)} training rows do not fit max_length {max_length} with their images and template whole "
        f"({_named(store, long)}): --max_length {store.column('tokens')[rows].max()} cuts nothing, "
        f"{store.column('required')[rows].max()} keeps a word of each answer{other}"
    )


def trained_tokens(store: Store, rows: np.ndarray, max_length: int | None) -> int:
    """About how many tokens of these rows are trained on within `max_length`, as `tokenize.shorten` cuts a
    row of one answer."""
    tokens, needed, answers = (store.column(name)[rows] for name in ("tokens", "required", "answer_tokens"))
    if max_length is None:
        return int(answers.sum())
    budget = max_length - (needed - 1)
    question = tokens - (needed - 1) - answers
    cut = np.minimum(answers, np.maximum(np.maximum(budget - question, budget // 2), 1))
    return int(np.where((needed <= max_length) & (max_length < tokens), cut, answers).sum())


def fitting_rows(store: Store, max_length: int | None, on_long_row: str) -> np.ndarray:
    """The rows to train on, counted within the training rows; shape `[n]`. Evaluation is always on all of
    its rows.

    Raises:
        DataError: see `length_problem`.
    """
    if (problem := length_problem(store, max_length, on_long_row)) is not None:
        raise DataError(problem)
    return np.flatnonzero(~np.isin(store.rows_of(TRAIN), rows_too_long(store, max_length)))


def rows_too_long(store: Store, max_length: int | None) -> np.ndarray:
    """The training rows whose images and template alone need more than `max_length` tokens, as the store's
    row numbers; shape `[n]`."""
    rows = store.rows_of(TRAIN)
    long: np.ndarray = rows[store.column("required")[rows] > length_limit(max_length)]
    return long


def length_limit(max_length: int | None) -> float:
    return np.inf if max_length is None else max_length


def _named(store: Store, rows: np.ndarray) -> str:
    sources, required = store.column("source"), store.column("required")
    named = "; ".join(f"{sources[row]} needs {required[row]}" for row in rows[:SHOWN])
    return named + (f"; and {len(rows) - SHOWN} more" if len(rows) > SHOWN else "")
