"""Reads tables as spreadsheet programs and pandas save them: CSV, TSV and semicolons, in their encodings."""

import codecs
import csv
import io
import re
from collections import Counter
from dataclasses import dataclass

from vlmtune.errors import DataError
from vlmtune.storage import check_no_special_file, filesystem

SEPARATORS = ",;\t"
SEPARATOR_LINE = re.compile(r'"?sep=(.)"?\r?\n?', re.IGNORECASE)  # Excel's own first line
# Cells that mean "no value" where a program wrote them. Words that can be an answer are not here.
MISSING = {"nan", "null", "<na>", "#n/a", "nat", "-nan", "#null!", "#value!", "#ref!", "#div/0!"}
WHOLE_NUMBER = re.compile(r"-?[0-9]+\.0+")
NUMBER = re.compile(r"-?[0-9]+(\.[0-9]+)?")


@dataclass(frozen=True)
class Table:
    """A header and its rows.

    Attributes:
        rows: (line number in the file, values) of each row. A row with a wrong number of fields stays as it
            is, so that its reader can name it.
        notes: for people: which values were read differently from how they are written.
    """

    columns: list[str]
    rows: list[tuple[int, list[str]]]
    notes: tuple[str, ...] = ()


def read_text(path: str, shown_path: str) -> str:
    """A text file in UTF-8, or in UTF-16 with its mark (Excel's "Unicode text"); line ends become `\\n`.

    Raises:
        DataError: the file is in another encoding.
    """
    check_no_special_file(path)
    system, inner = filesystem(path)
    with system.open_input_file(inner) as file:
        content = file.read()
    utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = str(content.decode("utf-16" if utf16 else "utf-8-sig"))
    except UnicodeDecodeError as error:
        if utf16:
            raise DataError(f"{shown_path}: UTF-16 text that is cut off: save the file as UTF-8") from error
        line = content[: error.start].count(b"\n") + 1
        raise DataError(
            f"{shown_path}:{line}: not UTF-8: save the file as UTF-8 (in Excel: CSV UTF-8)"
        ) from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_table(path: str, shown_path: str) -> Table:
    """The table in a file. Its separator is a comma, semicolon or tab, or what a first line `sep=…` says.

    Columns without a name and without values, and rows without values, are dropped. A column of whole numbers
    that pandas wrote as `3.0` is read as `3`, which a note says. A cell that means "no value" becomes empty.

    Raises:
        DataError: the file is not a table.
    """
    text = read_text(path, shown_path)
    first_line = 1
    if declared := SEPARATOR_LINE.match(text):
        text, first_line = text[declared.end() :], 2
    header = text.lstrip("\n").partition("\n")[0]
    separator = declared.group(1) if declared else max(SEPARATORS, key=header.count)
    lines = _cells(text, separator, shown_path, first_line)
    if not lines:
        raise DataError(f"{shown_path} is empty: it needs a header line and a line for each row")
    return _named(lines, shown_path)


def _cells(text: str, separator: str, shown_path: str, first_line: int) -> list[tuple[int, list[str]]]:
    reader = csv.reader(
        io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True, strict=True
    )
    lines, line = [], first_line
    try:
        for row in reader:
            if any(value.strip() for value in row):
                lines.append((line, [value.strip() for value in row]))
            line = reader.line_num + first_line
    except csv.Error as error:
        raise DataError(
            f"{shown_path}:{line}: not CSV: {error}; look for a quote that is not closed"
        ) from error
    return lines


def _named(lines: list[tuple[int, list[str]]], shown_path: str) -> Table:
    (header_line, header), rows = lines[0], lines[1:]
    width = len(header)
    # Spreadsheets write empty fields at the end of a row.
    rows = [
        (
            line,
            row[:width]
            if len(row) > width and not any(row[width:])
            else row + [""] * _missing_unnamed(row, header),
        )
        for line, row in rows
    ]
    empty = {
        number
        for number, name in enumerate(header)
        if not name and not any(len(row) > number and row[number] for _, row in rows if len(row) == width)
    }
    columns = [name or f"column {number + 1}" for number, name in enumerate(header) if number not in empty]
    doubled = next((column for column, count in Counter(columns).items() if count > 1), None)
    if doubled is not None:
        raise DataError(f"{shown_path}:{header_line}: two columns are called {doubled!r}: rename one")
    kept = [
        (
            line,
            [value for number, value in enumerate(row) if number not in empty] if len(row) == width else row,
        )
        for line, row in rows
    ]
    return _plain_values(columns, kept)


def _missing_unnamed(row: list[str], header: list[str]) -> int:
    """Number of fields that a short row lacks, if the columns of all these have no name; else 0."""
    lacking = header[len(row) :]
    return len(lacking) if not any(lacking) else 0


def _plain_values(columns: list[str], rows: list[tuple[int, list[str]]]) -> Table:
    """The values without pandas' marks: `3.0` in a column of whole numbers, `nan` for no value."""
    rows = [(line, ["" if value.lower() in MISSING else value for value in row]) for line, row in rows]
    notes = []
    for number, column in enumerate(columns):
        values = [row[number] for _, row in rows if len(row) == len(columns) and row[number]]
        whole = sum(bool(WHOLE_NUMBER.fullmatch(value)) for value in values)
        if whole and whole == sum(bool(NUMBER.fullmatch(value)) for value in values) == len(values):
            notes.append(f"column {column!r}: {whole} values such as {values[0]} are read as whole numbers")
            for _, row in rows:
                if len(row) == len(columns):
                    row[number] = row[number].partition(".")[0]
    return Table(columns, rows, tuple(notes))
