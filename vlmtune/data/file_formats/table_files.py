"""Reads CSV and TSV files that have a row of images, question and answer on each line."""

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from vlmtune.data.fragment import Format, Fragment, PathContents
from vlmtune.data.records import RawRow
from vlmtune.data.tables import read_table
from vlmtune.errors import DataError

JSON_COLUMNS = ("images", "messages", "conversations", "history", "objects")
SUFFIXES = (".csv", ".tsv")


def table_fragments(whole: Fragment) -> list[Fragment]:
    """The fragment of a table.

    Raises:
        DataError: the file is no table, has no rows, or its columns have no question and answer.
    """
    table = read_table(whole.path, whole.shown_path)
    whole.columns.check(table.columns, whole.shown_path)
    if whole.group_by and whole.group_by not in table.columns:
        raise DataError(
            f"--group_by {whole.group_by}: {whole.shown_path} has no such column; "
            f"it has: {', '.join(table.columns)}"
        )
    if not table.rows:
        raise DataError(f"{whole.shown_path} has a header and no rows: nothing to learn from")
    return [replace(whole, format=TABLE.name, reading_notes=table.notes)]


def table_rows(path: str, shown_path: str) -> Iterator[RawRow]:
    """A row for each line of a table; a line with a wrong number of fields gives a bad row."""
    table = read_table(path, shown_path)
    for line, values in table.rows:
        source = f"{shown_path}:{line}"
        if len(values) != len(table.columns):
            reason = (
                f"{len(values)} fields where the header has {len(table.columns)}: "
                "put quotes round text with commas"
            )
            yield RawRow(source, error=reason)
            continue
        cells = zip(table.columns, values, strict=True)
        record = {column: _value(column, value) for column, value in cells if value}
        yield RawRow(source, record, group_fields=record)


def _value(column: str, text: str) -> Any:
    """The value of a cell; lists and conversations that are written as JSON are parsed."""
    if column == "images" and not text.startswith("["):
        return [name.strip() for name in text.split(";")]
    if column in JSON_COLUMNS and text.startswith(("[", "{")):
        try:
            return json.loads(text)
        except ValueError:
            return text
    return text


def _recognizes(contents: PathContents) -> bool:
    return contents.suffix in SUFFIXES


def _cut(contents: PathContents) -> list[Fragment]:
    return table_fragments(contents.whole)


def _rows(fragment: Fragment) -> Iterator[RawRow]:
    return table_rows(fragment.path, fragment.shown_path)


TABLE = Format("table", _recognizes, _cut, _rows)
