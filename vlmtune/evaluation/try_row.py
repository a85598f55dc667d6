"""Tries a model on one row of its training data before it is trained."""

from __future__ import annotations

from typing import Any

import numpy as np

from vlmtune.data.encoded_example import shorten
from vlmtune.data.examples import read_examples
from vlmtune.data.split import TRAIN
from vlmtune.data.store import Store
from vlmtune.evaluation.generate import BatchBuilder
from vlmtune.model.causal import check_causal


def try_row(base: Any, store: Store, usable_rows: np.ndarray, max_length: int | None) -> None:
    """Check that a base accepts a training row (with an image if any has one) and is causal.

    Args:
        usable_rows: the rows of the training split that are trained on.

    Raises:
        ModelError: see `check_causal`.
    """
    rows = store.rows_of(TRAIN)[usable_rows]
    with_image = rows[store.column("image_tokens")[rows] > 0]
    row = int((with_image if len(with_image) else rows)[0])
    example = shorten(read_examples(store, [row])[0], max_length)
    check_causal(base, BatchBuilder.of(store).batch(base, [example]))
