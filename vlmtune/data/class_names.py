"""Columns of class numbers in Hugging Face data (`ClassLabel`), read as the names of the classes."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

NO_CLASS = -1  # what `datasets` writes where a row has no label
NAMES_SHOWN = 3
ClassNames = dict[str, tuple[str, ...]]  # by column, in the order of their numbers


def class_names(schema: pa.Schema) -> ClassNames:
    """The names of each ClassLabel column of an Arrow schema, if `datasets` wrote it; else empty."""
    try:
        content = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        features = content.get("info", {}).get("features", {})
    except (ValueError, AttributeError):
        return {}
    if not isinstance(features, Mapping):
        return {}
    return {
        column: tuple(map(str, feature["names"]))
        for column, feature in features.items()
        if column in schema.names
        and isinstance(feature, Mapping)
        and feature.get("_type") == "ClassLabel"
        and isinstance(feature.get("names"), Sequence)
    }


def notes_on(names: ClassNames, read: Sequence[str]) -> tuple[str, ...]:
    """Notes for people on those columns that are read."""
    return tuple(
        f"column {column}: numbers are read as the names of their classes ({_listed(names[column])})"
        for column in names
        if column in read
    )


def with_class_names(record: dict[str, Any], names: ClassNames) -> tuple[dict[str, Any], str | None]:
    """(record with class names in place of numbers, error if a number has no name, else None)."""
    named = dict(record)
    for column, classes in names.items():
        number = record.get(column)
        if type(number) is not int:
            continue
        if number == NO_CLASS:
            named[column] = None
        elif not 0 <= number < len(classes):
            return record, f"column {column!r} is {number}, and there are {len(classes)} classes"
        else:
            named[column] = classes[number]
    return named, None


def _listed(classes: Sequence[str]) -> str:
    more = len(classes) - NAMES_SHOWN
    return ", ".join(classes[:NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")
