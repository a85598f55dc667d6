"""Which values of `max_length` in a search space fit the prepared rows."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vlmtune.config.flag_table import ALIASES
from vlmtune.data.lengths import length_limit
from vlmtune.data.split import TRAIN
from vlmtune.data.store import Store
from vlmtune.errors import DataError

NAMES = ("max_length", *(alias for alias, name in ALIASES.items() if name == "max_length"))
EXCLUSIVE_RANGES = ("randint", "lograndint")  # their upper bound is not drawn
RANGES = (*EXCLUSIVE_RANGES, "quniform", "qloguniform")


def usable_max_lengths(
    store: Store, search_space: Mapping[str, Any], *, on_long_row: str = "error"
) -> tuple[dict[str, Any], list[str]]:
    """Remove values of `max_length` that are too small for the images of a training row.

    With `on_long_row="skip"`, rows that do not even fit the largest value are not considered here: every
    trial leaves them out, so that all trials train on the same rows.

    Args:
        search_space: the config's `search_space`; `Space.parse` checks it. An expression stays as it is.

    Returns:
        The search space, and a line about the removed values, if there are any.

    Raises:
        DataError: no value is left.
    """
    key = next((name for name in NAMES if name in search_space), None)
    if key is None or not (values := searched_max_lengths(search_space)):
        return dict(search_space), []
    # The tokens of a row that cannot be cut off: those of its images and of the template.
    rows = store.rows_of(TRAIN)
    required = store.column("required")[rows]
    largest = max(map(length_limit, values))
    considered = rows[required <= largest] if on_long_row == "skip" else rows
    if not len(considered):
        raise DataError(
            f"search_space: {key}: no training row fits {largest:g} tokens; the shortest needs "
            f"{required.min()}"
        )
    longest = considered[np.argmax(store.column("required")[considered])]
    floor = int(store.column("required")[longest])
    need = f"the images and template of {store.column('source')[longest]} alone need {floor} tokens"
    if largest < floor:
        raise DataError(
            f"search_space: {key}: no value can be used, {need}: search from {floor} on, or give "
            "--on_long_row skip"
        )
    if min(map(length_limit, values)) >= floor:
        return dict(search_space), []
    entry, removed = _without_values_below(search_space[key], floor)
    return {**search_space, key: entry}, [f"{key} {removed} will not be searched: {need}"]


def searched_max_lengths(search_space: Mapping[str, Any]) -> list[int | None]:
    """The values of `max_length` in a search space.

    All values of a choice or grid, a single value, or both ends of a range; none for an expression.
    """
    entry = next((search_space[name] for name in NAMES if name in search_space), None)
    if isinstance(entry, int):
        return [entry]
    if not isinstance(entry, Mapping) or len(entry) != 1:
        return []
    ((kind, arguments),) = entry.items()
    if kind in ("choice", "grid") and isinstance(arguments, Sequence):
        return [value for value in arguments if value is None or isinstance(value, int)]
    if kind in RANGES and isinstance(arguments, Sequence) and len(arguments) >= 2:
        return [int(arguments[0]), int(arguments[1]) - (kind in EXCLUSIVE_RANGES)]
    return []


def _without_values_below(entry: Mapping[str, Any], floor: int) -> tuple[Any, str]:
    """A distribution without its values below `floor`, and the removed values in words."""
    ((kind, arguments),) = entry.items()
    if kind not in RANGES:
        removed = sorted(value for value in arguments if length_limit(value) < floor)
        return {kind: [value for value in arguments if value not in removed]}, " and ".join(map(str, removed))
    low, high, *quantum = arguments
    # Bounds are multiples of the quantum.
    raised = -(-floor // int(quantum[0])) * int(quantum[0]) if quantum else floor
    single = raised == high - (kind in EXCLUSIVE_RANGES)
    return (raised if single else {kind: [raised, high, *quantum]}), f"from {low} to {raised - 1}"
