"""Converts rows that other programs wrote to the shapes that `records` reads (`as_known_shape`)."""

import base64
import binascii
import re
from collections.abc import Mapping, Sequence
from typing import Any

from vlmtune.data.image_paths import RowError

# (question, answer) of shapes that are read as `instruction` and `output`.
QUESTION_FIELDS = (
    ("question", "answer"),
    ("query", "response"),
    ("prompt", "completion"),
    ("prompt", "response"),
)
DIALOGUE_FIELDS = ("messages", "conversations", "instruction")
DATA_URI = re.compile(r"data:image/[\w.+-]+;base64,", re.IGNORECASE)


def question_fields(names: Mapping[str, Any] | Sequence[str] | set[str]) -> tuple[str, str] | None:
    """The fields of a row's question and answer; None if the row is not such a pair."""
    if any(field in names for field in DIALOGUE_FIELDS):
        return None
    return next((pair for pair in QUESTION_FIELDS if pair[0] in names and pair[1] in names), None)


def as_known_shape(record: Any) -> tuple[Any, dict[str, str]]:
    """(the record in a shape that `records.conversation` reads, {new name: old name} of renamed fields).

    Questions with answers (`question`/`answer`, ms-swift's `query`/`response`, TRL's `prompt`/`completion` as
    strings) become `instruction` and `output`. OpenAI's `image_url` parts become image parts, and images in
    data URIs their bytes.

    Raises:
        RowError: a data URI cannot be decoded, or an image_url part is malformed.
    """
    if not isinstance(record, Mapping):
        return record, {}
    row = dict(record)
    renamed: dict[str, str] = {}
    pair = question_fields(row)
    if pair is not None and all(isinstance(row[field], str | int | float) for field in pair):
        renamed = {"instruction": pair[0], "output": pair[1]}
        row |= {"instruction": row.pop(pair[0]), "output": row.pop(pair[1])}
    for field in ("image", "images"):
        if field in row:
            row[field] = _decoded(row[field], field)
    for field in ("messages", "prompt", "completion"):
        if isinstance(row.get(field), Sequence) and not isinstance(row[field], str | bytes):
            row[field] = [_turn(turn, f"{field}[{number}]") for number, turn in enumerate(row[field])]
    return row, renamed


def _turn(turn: Any, field: str) -> Any:
    if not isinstance(turn, Mapping) or not isinstance(turn.get("content"), list):
        return turn
    parts = [_part(part, f"{field}.content[{number}]") for number, part in enumerate(turn["content"])]
    return {**turn, "content": parts}


def _part(part: Any, field: str) -> Any:
    if not isinstance(part, Mapping):
        return part
    if part.get("type") == "image_url":
        url = part.get("image_url")
        url = url.get("url") if isinstance(url, Mapping) else url
        if not isinstance(url, str):
            raise RowError(f'{field} must be {{"type": "image_url", "image_url": {{"url": …}}}}')
        return {"type": "image", "image": _decoded(url, field)}
    if part.get("type") == "image":
        return {
            key: _decoded(value, field) if key in ("image", "url") else value for key, value in part.items()
        }
    return part


def _decoded(value: Any, field: str) -> Any:
    """The bytes of an image in a data URI; any other value as it is."""
    if isinstance(value, list):
        return [_decoded(item, f"{field}[{number}]") for number, item in enumerate(value)]
    if not isinstance(value, str) or not (head := DATA_URI.match(value)):
        return value
    try:
        return {"bytes": base64.b64decode(value[head.end() :], validate=True), "path": None}
    except (binascii.Error, ValueError) as error:
        raise RowError(f"{field} is a data URI whose base64 is broken: {error}") from error
