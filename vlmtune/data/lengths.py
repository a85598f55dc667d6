"""Which training rows fit `max_length`, and how many of their tokens are trained on. Reads the index only."""

from collections.abc import Sequence

import numpy as np

from vlmtune.data.order import Mixture
from vlmtune.data.split import TRAIN
from vlmtune.data.store import Store
from vlmtune.errors import DataError

ROWS_IN_MESSAGE = 3


def length_problem(store: Store, max_length: int | None, on_long_row: str) -> str | None:
    """Why the training rows cannot be shortened to `max_length`, and what to do, in one line.

    None if all can be shortened, or if the others are skipped.
    """
    rows, long = store.rows_of(TRAIN), rows_too_long(store, max_length)
    if not len(long) or (on_long_row == "skip" and len(long) < len(rows)):
        return None
    skip = ", --on_long_row skip leaves them out" if len(long) < len(rows) else ""
    return (
        f"{len(long)} of {len(rows)} training rows do not fit max_length {max_length} "
        f"with their images and template whole ({_listed(store, long)}): "
        f"--max_length {store.column('tokens')[rows].max()} keeps all rows whole, "
        f"{store.column('required')[rows].max()} keeps a word of each answer{skip}"
    )


def trained_tokens(store: Store, rows: np.ndarray, max_length: int | None) -> int:
    """Number of tokens of these rows that are trained on after `encoded_example.shorten`.

    It is exact for rows with one answer, and approximate for others.
    """
    tokens, required, answers = (store.column(name)[rows] for name in ("tokens", "required", "answer_tokens"))
    if max_length is None:
        return int(answers.sum())
    budget = max_length - (required - 1)
    question = tokens - (required - 1) - answers
    shortened = np.minimum(answers, np.maximum(np.maximum(budget - question, budget // 2), 1))
    return int(np.where((required <= max_length) & (max_length < tokens), shortened, answers).sum())


def fitting_rows(store: Store, max_length: int | None, on_long_row: str) -> np.ndarray:
    """The rows to train on, as positions within the training rows; shape `[n]`.

    Evaluation always uses all of its rows.

    Raises:
        DataError: see `length_problem`.
    """
    if (problem := length_problem(store, max_length, on_long_row)) is not None:
        raise DataError(problem)
    return np.flatnonzero(~np.isin(store.rows_of(TRAIN), rows_too_long(store, max_length)))


def rows_too_long(store: Store, max_length: int | None) -> np.ndarray:
    """Row numbers of the training rows that need more than `max_length` tokens for images and template.

    Shape `[n]`.
    """
    rows = store.rows_of(TRAIN)
    long: np.ndarray = rows[store.column("required")[rows] > length_limit(max_length)]
    return long


def lengths_to_group(
    store: Store, usable_rows: np.ndarray, strategy: str, max_length: int | None
) -> tuple[int, ...] | None:
    """Tokens of each usable row, at most `max_length`; None unless rows are grouped by their length.

    Args:
        strategy: `--train_sampling_strategy`.
    """
    if strategy != "group_by_length":
        return None
    tokens = store.column("tokens")[store.rows_of(TRAIN)[usable_rows]]
    return tuple(np.minimum(tokens, length_limit(max_length)).astype(int).tolist())


def length_limit(max_length: int | None) -> float:
    """`max_length` as a number; infinite if it is None."""
    return np.inf if max_length is None else max_length


def _listed(store: Store, rows: np.ndarray) -> str:
    """The first rows and the tokens that they need, for a message."""
    sources, required = store.column("source"), store.column("required")
    first = "; ".join(f"{sources[row]} needs {required[row]}" for row in rows[:ROWS_IN_MESSAGE])
    more = len(rows) - ROWS_IN_MESSAGE
    return first + (f"; and {more} more" if more > 0 else "")


def mixture_of(store: Store, usable: np.ndarray, weights: Sequence[float] | None) -> Mixture | None:
    """How `--data_weights` mixes the sources of the training rows; None if every row is drawn once an epoch.

    Args:
        usable: the rows that are trained on, from `fitting_rows`.
    """
    if weights is None:
        return None
    ends = np.cumsum(store.meta.source_fragments)
    sources = np.searchsorted(ends, store.column("fragment")[store.rows_of(TRAIN)[usable]], side="right")
    sizes = np.bincount(sources, minlength=len(ends))
    return Mixture(tuple(int(size) for size in sizes), tuple(weights))
