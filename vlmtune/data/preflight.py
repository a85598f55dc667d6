"""What can be known before a GPU is taken: whether the prepared rows can be trained on, and at which lengths. Reads the index only."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vlmtune.arguments import ALIASES
from vlmtune.config import Settings
from vlmtune.data.split import TRAIN
from vlmtune.data.store import Store
from vlmtune.errors import DataError

NAMES = ("max_length", *(alias for alias, name in ALIASES.items() if name == "max_length"))
EXCLUSIVE = ("randint", "lograndint")  # their upper bound is not drawn
RANGES = (*EXCLUSIVE, "quniform", "qloguniform")
SHOWN = 3  # rows named in a message


def check(store: Store, settings: Settings) -> list[str]:
    """Why training on these rows cannot work with these settings, each in one line with its way out; empty if it can."""
    refusal = store.refusal(settings.data.on_bad_row, named=False)
    length = length_problem(store, settings.get("max_length"), settings.data.on_long_row)
    return [problem for problem in (refusal, length) if problem is not None]


def length_problem(store: Store, max_length: int | None, on_long_row: str) -> str | None:
    """Why the training rows cannot be cut to `max_length`, in one line with the way out; None if they can, or may be left out."""
    rows, long = store.rows_of(TRAIN), too_long(store, max_length)
    if not len(long) or (on_long_row == "skip" and len(long) < len(rows)):
        return None
    other = ", --on_long_row skip leaves them out" if len(long) < len(rows) else ""
    return (
        f"{len(long)} of {len(rows)} training rows do not fit max_length {max_length} with their images and template whole "
        f"({_named(store, long)}): --max_length {store.column('tokens')[rows].max()} cuts nothing, "
        f"{store.column('required')[rows].max()} keeps a word of each answer{other}"
    )


def trained_tokens(store: Store, rows: np.ndarray, max_length: int | None) -> int:
    """About how many tokens of these rows are trained on within `max_length`, as `tokenize.shorten` cuts a row of one answer."""
    tokens, needed, answers = (store.column(name)[rows] for name in ("tokens", "required", "answer_tokens"))
    if max_length is None:
        return int(answers.sum())
    budget = max_length - (needed - 1)
    question = tokens - (needed - 1) - answers
    cut = np.minimum(answers, np.maximum(np.maximum(budget - question, budget // 2), 1))
    return int(np.where((needed <= max_length) & (max_length < tokens), cut, answers).sum())


def fitting_rows(store: Store, max_length: int | None, on_long_row: str) -> np.ndarray:
    """The rows to train on, counted within the training rows; shape `[n]`. Evaluation is always on all of its rows.

    Raises:
        DataError: see `length_problem`.
    """
    if (problem := length_problem(store, max_length, on_long_row)) is not None:
        raise DataError(problem)
    return np.flatnonzero(~np.isin(store.rows_of(TRAIN), too_long(store, max_length)))


def too_long(store: Store, max_length: int | None) -> np.ndarray:
    """The training rows whose images and template alone need more than `max_length` tokens, as the store's row numbers; shape `[n]`."""
    rows = store.rows_of(TRAIN)
    long: np.ndarray = rows[store.column("required")[rows] > _limit(max_length)]
    return long


def usable_max_lengths(store: Store, search_space: Mapping[str, Any], *, on_long_row: str = "error") -> tuple[dict[str, Any], list[str]]:
    """The search space without the values of `max_length` that the images of a training row do not fit, and a line on what was removed.

    With `on_long_row="skip"`, rows that do not even fit the largest value are left out of every trial and ask for nothing, so that all
    trials train on the same rows. An expression stays as it is. The space itself is checked by whoever parses it.

    Raises:
        DataError: no value is left.
    """
    key = next((name for name in NAMES if name in search_space), None)
    if key is None or not (values := searched_max_lengths(search_space)):
        return dict(search_space), []
    rows = store.rows_of(TRAIN)
    required = store.column("required")[rows]
    largest = max(map(_limit, values))
    counted = rows[required <= largest] if on_long_row == "skip" else rows
    if not len(counted):
        raise DataError(f"search_space: {key}: no training row fits {largest:g} tokens; the shortest needs {required.min()}")
    longest = counted[np.argmax(store.column("required")[counted])]
    floor = int(store.column("required")[longest])
    need = f"the images and template of {store.column('source')[longest]} alone need {floor} tokens"
    if largest < floor:
        raise DataError(f"search_space: {key}: no value can be used, {need}: search from {floor} on, or give --on_long_row skip")
    if min(map(_limit, values)) >= floor:
        return dict(search_space), []
    entry, removed = _raised(search_space[key], floor)
    return {**search_space, key: entry}, [f"{key} {removed} will not be searched: {need}"]


def searched_max_lengths(search_space: Mapping[str, Any]) -> list[int | None]:
    """The values of `max_length` in a search space: all of a choice, grid or single value, the ends of a range, none of an expression."""
    entry = next((search_space[name] for name in NAMES if name in search_space), None)
    if isinstance(entry, int):
        return [entry]
    if not isinstance(entry, Mapping) or len(entry) != 1:
        return []
    ((kind, arguments),) = entry.items()
    if kind in ("choice", "grid") and isinstance(arguments, Sequence):
        return [value for value in arguments if value is None or isinstance(value, int)]
    if kind in RANGES and isinstance(arguments, Sequence) and len(arguments) >= 2:
        return [int(arguments[0]), int(arguments[1]) - (kind in EXCLUSIVE)]
    return []


def _raised(entry: Mapping[str, Any], floor: int) -> tuple[Any, str]:
    """The distribution without what is below `floor`, of which something is left; and what was removed, in words."""
    ((kind, arguments),) = entry.items()
    if kind not in RANGES:
        removed = sorted(value for value in arguments if _limit(value) < floor)
        return {kind: [value for value in arguments if value not in removed]}, " and ".join(map(str, removed))
    low, high, *quantum = arguments
    raised = -(-floor // int(quantum[0])) * int(quantum[0]) if quantum else floor  # bounds are multiples of the quantum
    only = raised == high - (kind in EXCLUSIVE)
    return (raised if only else {kind: [raised, high, *quantum]}), f"from {low} to {raised - 1}"


def _limit(max_length: int | None) -> float:
    return np.inf if max_length is None else max_length


def _named(store: Store, rows: np.ndarray) -> str:
    sources, required = store.column("source"), store.column("required")
    named = "; ".join(f"{sources[row]} needs {required[row]}" for row in rows[:SHOWN])
    return named + (f"; and {len(rows) - SHOWN} more" if len(rows) > SHOWN else "")
