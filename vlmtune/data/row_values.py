"""Checks values of a row, and collects notes for people about the row."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from vlmtune.data.image_paths import RowError


class RowNotes:
    """Collects what people are told about one row: unused fields, and notes on how it was read."""

    def __init__(self) -> None:
        self.unused: list[str] = []
        self.reading_notes: list[str] = []

    def note(self, text: str | None) -> None:
        """Add a note, once."""
        if text is not None and text not in self.reading_notes:
            self.reading_notes.append(text)

    def text(self, value: Any, field: str) -> str:
        """A text or a number as a text.

        Raises:
            RowError: the value is neither.
        """
        if isinstance(value, int | float) and not isinstance(value, bool):
            if value != value:
                raise RowError(f"{field} is NaN, a missing value: fill it in")
            self.note("numbers are read as their digits")
            return str(int(value)) if float(value).is_integer() else str(value)
        if isinstance(value, bool):
            raise RowError(
                f'{field} must be a string, not a boolean: write the word that is meant, such as "yes"'
            )
        return check_text(value, field)


def check_text(text: Any, field: str) -> str:
    """Check a text and return it.

    Raises:
        RowError: it is not a string, or cannot be encoded as UTF-8.
    """
    if not isinstance(text, str):
        raise RowError(f"{field} must be a string, not {json_type(text)}")
    broken = re.search("[\ud800-\udfff]", text)
    if broken and "\udc80" <= broken.group() <= "\udcff":
        raise RowError(f"{field} holds bytes that are not UTF-8: save the file as UTF-8")
    if broken:
        raise RowError(
            f"{field} holds half a character (\\u{ord(broken.group()):04x} without its pair): "
            "write the character whole"
        )
    return text


def json_type(value: Any) -> str:
    """The JSON type of a value, in words."""
    names = (
        (type(None), "null"),
        (bool, "a boolean"),
        (int | float, "a number"),
        (str, "a string"),
        (bytes, "bytes"),
        (Mapping, "an object"),
    )
    other = "a list" if isinstance(value, Sequence) else type(value).__name__
    return next((name for form, name in names if isinstance(value, form)), other)
