"""Find the images and videos of a row, and bring them into the order of the marks in its texts."""

from collections.abc import Mapping, Sequence
from typing import Any

from vlmtune.data.image_paths import ImagePlace, ImageRules, RowError
from vlmtune.data.marks import IMAGE_MARK, read_other_marks, split_marks
from vlmtune.data.row_values import RowNotes, json_type
from vlmtune.data.turns import Turn


def record_images(record: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """(field, image) of each image in the record's fields `image` or `images`."""
    fields = [key for key in ("image", "images") if record.get(key) is not None]
    if len(fields) > 1:
        raise RowError("the row has both 'image' and 'images': keep one")
    if not fields:
        return []
    value = record[fields[0]]
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [(f"{fields[0]}[{number}]", image) for number, image in enumerate(value)]
    return [(fields[0], value)]


def place_images(
    turns: list[Turn], images: list[tuple[str, Any]], row_notes: RowNotes
) -> list[tuple[str, Any]]:
    """All images of the row in the order of the image parts.

    If the turns have no image part, marks of other programs are turned into image parts. If there are none
    either, image parts are put before the first user text.
    """
    if not any(part["type"] == "image" for turn in turns for part in turn.parts):
        _take_other_marks(turns, len(images), row_notes)
    parts = [part for turn in turns for part in turn.parts if part["type"] == "image"]
    if not parts:
        first = next(turn for turn in turns if turn.role == "user")
        first.parts[:0] = [{"type": "image"} for _ in images]
        return images
    marks = sum("image" not in part for part in parts)
    if marks != len(images):
        raise RowError(
            f"{_count(marks, IMAGE_MARK + ' mark')} but {_count(len(images), 'image')}: "
            "give each image one mark, or no marks at all"
        )
    unplaced = iter(images)
    return [
        (f"{part['field']}.image", part["image"]) if "image" in part else next(unplaced) for part in parts
    ]


def _take_other_marks(turns: list[Turn], images: int, row_notes: RowNotes) -> None:
    """Turn image marks of other programs in user texts into image parts."""
    texts = [part for turn in turns if turn.role == "user" for part in turn.parts if part["type"] == "text"]
    rewritten = read_other_marks([part["text"] for part in texts], images)
    if rewritten is None:
        return
    row_notes.note(f"the mark {rewritten[1]} is read as {IMAGE_MARK}")
    new_texts = iter(rewritten[0])
    for turn in turns:
        if turn.role == "user":
            turn.parts[:] = [
                new
                for part in list(turn.parts)
                for new in (split_marks(next(new_texts)) if part["type"] == "text" else [part])
            ]


def locate_video(reference: str, rules: ImageRules) -> ImagePlace:
    try:
        return rules.locate(reference)
    except RowError as error:
        message = str(error)
        raise RowError(message.replace("image ", "video ")) from error


def locate_image(value: Any, field: str, rules: ImageRules) -> ImagePlace | bytes:
    """Where an image is, or its encoded bytes."""
    if isinstance(value, Mapping):
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
        if value is None:
            raise RowError(f"{field} holds neither bytes nor a path")
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        raise RowError(f"{field} must be a path or bytes, not {json_type(value)}")
    return rules.locate(value)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
