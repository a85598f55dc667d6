"""Which rows are trained on at a `max_length`: those whose images and template fit. Text is shortened, images never."""

import numpy as np

from vlmtune.data.split import TRAIN
from vlmtune.data.store import Store
from vlmtune.errors import DataError


def fitting_rows(store: Store, max_length: int | None, on_long_row: str) -> np.ndarray:
    """The rows to train on, counted within the training rows; shape `[n]`. Evaluation is always on all of its rows.

    Raises:
        DataError: a row needs more than `max_length` and `on_long_row` is "error", or no row is left.
    """
    rows = store.rows_of(TRAIN)
    required = store.column("required")[rows]
    fits = required <= (max_length or np.inf)
    if fits.all():
        return np.arange(len(rows))
    first = rows[int(np.argmin(fits))]
    problem = (
        f"{(~fits).sum()} of {len(rows)} training rows do not fit --max_length {max_length} with their images and template whole, "
        f"the first is {store.column('source')[first]}"
    )
    enough = f"--max_length {required.max()} holds them all"
    if on_long_row == "error":
        raise DataError(f"{problem}: {enough}, --on_long_row skip leaves them out")
    if not fits.any():
        raise DataError(f"{problem}: {enough}, {required.min()} the shortest")
    return np.flatnonzero(fits)
