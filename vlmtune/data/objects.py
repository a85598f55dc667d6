"""Boxes and points of a row in ms-swift's form: the field `objects`, `<ref-object>` and `<bbox>`."""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from vlmtune.data.image_paths import RowError
from vlmtune.data.row_values import RowNotes, check_text, json_type
from vlmtune.data.unused import is_empty

# A mark, but not a closed tag: `<ref>a cat</ref>` is the text that some model families use.
REF_MARK = re.compile(r"<ref-object>|<ref>(?![^<>]*</ref>)")
BOX_MARK = re.compile(r"<bbox>(?![^<>]*</bbox>)")
UNITS = ("real", "norm1", "norm1000")  # of the numbers in `bbox`: pixels of the image, shares, thousandths
USED_FIELDS = ("ref", "bbox", "bbox_type", "image_id", "width", "height")
Objects = dict[str, Any]


def read_objects(
    value: Any, texts: Sequence[str], images: int, row_notes: RowNotes, *, has_answer: bool = True
) -> Objects | None:
    """The boxes and points of a row, checked against the marks in its texts; None if there are none.

    Args:
        value: the row's field `objects`, or the JSON of it.
        texts: the texts of all turns, in order.
        images: number of the row's images.
        has_answer: whether the row's last turn is an answer. Without it, boxes may have no mark.

    Returns:
        A dict of plain values: `refs`, `boxes` of two (a point) or four numbers, `images` with the number of
            each
        box's image, `unit` (one of UNITS), and `sizes`, the [width, height] of each image if the row has
        them.

    Raises:
        RowError: boxes and marks do not fit each other, or a value is not a box.
    """
    value = _as_mapping(value)
    refs, boxes = (_list(value, name) for name in ("ref", "bbox"))
    marks = sum(len(BOX_MARK.findall(text)) for text in texts)
    ref_marks = sum(len(REF_MARK.findall(text)) for text in texts)
    if not boxes and not refs:
        named = next((match.group() for text in texts for match in BOX_MARK.finditer(text)), None)
        named = named or ("<ref-object>" if any("<ref-object>" in text for text in texts) else None)
        if named is not None:
            raise RowError(
                f"the text holds {named}, but the row has no 'objects' with "
                f"{'ref' if named == '<ref-object>' else 'bbox'}"
            )
        return None
    _check_count("<bbox>", marks, "box", len(boxes), has_answer=has_answer)
    if ref_marks:
        _check_count("<ref-object>", ref_marks, "ref", len(refs), has_answer=has_answer)
    elif refs:
        row_notes.unused.append("field objects.ref")
    row_notes.unused += [f"field objects.{name}" for name in value if name not in USED_FIELDS]
    if boxes and not images:
        raise RowError("field 'objects' holds boxes, but the row has no image")
    unit = value.get("bbox_type") or "real"
    if unit not in UNITS:
        raise RowError(f"objects.bbox_type is {unit!r}: it must be one of {', '.join(UNITS)}")
    return {
        "refs": [check_text(ref, f"objects.ref[{number}]") for number, ref in enumerate(refs)],
        "boxes": [_box(box, f"objects.bbox[{number}]") for number, box in enumerate(boxes)],
        "images": _image_ids(value.get("image_id"), len(boxes), images),
        "unit": unit,
        "sizes": _sizes(value, images),
    }


def holds_marks(texts: Iterable[str]) -> bool:
    """Whether a text contains a mark of ms-swift."""
    return any(BOX_MARK.search(text) or "<ref-object>" in text for text in texts)


def _as_mapping(value: Any) -> Mapping[str, Any]:
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except ValueError as error:
            raise RowError(f"field 'objects' is a text that is no JSON: {error}") from error
    if is_empty(value):
        return {}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return _from_list(value)
    if not isinstance(value, Mapping):
        raise RowError(f"field 'objects' must be an object with 'ref' and 'bbox', not {json_type(value)}")
    return value


def _from_list(items: Sequence[Any]) -> Mapping[str, Any]:
    """Objects from a list such as [{"ref": "a cat", "bbox": [1, 2, 3, 4]}, …]."""
    if not all(isinstance(item, Mapping) and "bbox" in item for item in items):
        raise RowError("field 'objects' must be an object with 'ref' and 'bbox', or a list of such objects")
    name = next((key for key in ("ref", "caption") if all(key in item for item in items)), None)
    columns = {
        "ref": [] if name is None else [item[name] for item in items],
        "bbox": [item["bbox"] for item in items],
    }
    types = {item.get("bbox_type") for item in items}
    if len(types) > 1:
        raise RowError("objects have several values of bbox_type: write all boxes in one unit")
    ids = [item.get("image_id", item.get("image")) for item in items]
    more = {"image_id": ids} if any(number is not None for number in ids) else {}
    return {**columns, **more, "bbox_type": types.pop()}


def _list(value: Mapping[str, Any], name: str) -> list[Any]:
    found = value.get(name)
    if is_empty(found):
        return []
    if isinstance(found, str) and name == "ref":
        return [found]
    if not isinstance(found, Sequence) or isinstance(found, str | bytes):
        raise RowError(f"objects.{name} must be a list, not {json_type(found)}")
    if name == "bbox" and all(_is_number(number) for number in found):
        return [found]  # one box
    return list(found)


def _check_count(mark: str, marks: int, noun: str, number: int, *, has_answer: bool) -> None:
    if marks == number or (not has_answer and marks < number):
        return
    plural = "es" if noun == "box" else "s"
    raise RowError(
        f"{marks} {mark} mark{'' if marks == 1 else 's'} but {number} {noun}{'' if number == 1 else plural} "
        f"in 'objects': write one {mark} where each {noun} stands"
    )


def _box(box: Any, field: str) -> list[float]:
    """The two or four numbers of a point or box.

    Raises:
        RowError: it has other values, or the box is reversed or empty.
    """
    whole = isinstance(box, Sequence) and not isinstance(box, str | bytes)
    if not whole or len(box) not in (2, 4) or not all(_is_number(number) for number in box):
        raise RowError(f"{field} must be [x1, y1, x2, y2], or a point [x, y], in numbers; it is {box!r:.60}")
    numbers = [float(number) for number in box]
    if len(box) == 4 and not (numbers[0] < numbers[2] and numbers[1] < numbers[3]):
        raise RowError(
            f"{field} {format_box(numbers)} is reversed or empty: it must be [x1, y1, x2, y2] with the "
            "upper left "
            "corner first, not a width and height"
        )
    return numbers


def format_box(box: Sequence[float]) -> str:
    """A box as people write it."""
    return "[" + ", ".join(f"{number:g}" for number in box) + "]"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _image_ids(value: Any, boxes: int, images: int) -> list[int]:
    if is_empty(value):
        if images > 1 and boxes:
            raise RowError(
                f"the row has {images} images, and objects.image_id does not say which image each box is "
                "in: give a list such as [0, 1], counted from 0"
            )
        return [0] * boxes
    numbers = list(value) if isinstance(value, Sequence) and not isinstance(value, str | bytes) else [value]
    if len(numbers) != boxes or not all(type(number) is int and 0 <= number < images for number in numbers):
        raise RowError(
            f"objects.image_id is {value!r:.60}: it must have a number for each of {boxes} boxes, from 0 to "
            f"{images - 1}"
        )
    return numbers


def _sizes(value: Mapping[str, Any], images: int) -> list[list[int]]:
    """The image sizes that the boxes refer to; empty if the row does not have them."""
    widths, heights = value.get("width"), value.get("height")
    if is_empty(widths) or is_empty(heights):
        return []
    pairs = [one if isinstance(one, Sequence) else [one] for one in (widths, heights)]
    if len(pairs[0]) != images or len(pairs[1]) != images:
        raise RowError("objects.width and objects.height must have a number for each image")
    return [list(pair) for pair in zip(*pairs, strict=True)]
