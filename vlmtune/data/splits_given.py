"""Splits that the data itself gives: a field or column `split`, and the names of files and Hub splits."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from vlmtune.data.split import EVAL, TEST, TRAIN

SPLIT_FIELDS = ("split", "data_split", "dataset_split", "subset", "partition")
WORDS = {
    "train": TRAIN,
    "training": TRAIN,
    "val": EVAL,
    "valid": EVAL,
    "validation": EVAL,
    "dev": EVAL,
    "eval": EVAL,
    "evaluation": EVAL,
    "test": TEST,
    "testing": TEST,
    "학습": TRAIN,
    "훈련": TRAIN,
    "검증": EVAL,
    "평가": TEST,
    "테스트": TEST,
}


def split_of(value: Any) -> str | None:
    """The split that `value` is a word for: TRAIN, EVAL or TEST; None if it is none."""
    return WORDS.get(value.strip().lower()) if isinstance(value, str) else None


def split_of_name(name: str) -> str | None:
    """The split that a file, folder or Hub split is named after: `val.jsonl`, `captions_train2017.json`.

    None if the name contains no word for a split, or words for several.
    """
    words = re.split(r"[^0-9a-z가-힣]+", name.partition(".")[0].lower())
    found = {split for word in words if (split := WORDS.get(re.sub(r"[0-9]+$", "", word))) is not None}
    return found.pop() if len(found) == 1 else None


def split_column(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str | None:
    """The column that says each row's split: it is named so, and all its values are words for splits."""
    for number, column in enumerate(columns):
        if column.lower() in SPLIT_FIELDS:
            values = {row[number] for row in rows if len(row) > number and row[number]}
            if values and all(split_of(value) for value in values):
                return column
    return None


def split_field(record: Mapping[str, Any]) -> tuple[str, str] | None:
    """(name, split) of the field that says a row's split; None if the row has no such field."""
    for name in SPLIT_FIELDS:
        if (split := split_of(record.get(name))) is not None:
            return name, split
    return None
