"""One raw record, in any understood shape → one conversation with its images, or the reason why not."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from vlmtune.data.image_paths import ImageRules, RowError

Part = dict[str, Any]
Message = dict[str, Any]

IMAGE_MARK = "<image>"
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
# Fields that a row of each format must have. A row has the first format whose first field it has.
REQUIRED = {
    "messages": ("messages",),
    "LLaVA": ("conversations",),
    "prompt/completion": ("prompt", "completion"),
    "instruction": ("instruction", "output"),
}
FIELDS = (
    "messages",
    "conversations",
    "prompt",
    "completion",
    "instruction",
    "input",
    "output",
    "system",
    "image",
    "images",
)


@dataclass(frozen=True)
class RawRow:
    """A row as a reader gave it.

    Attributes:
        source: its place for people, such as FILE:LINE.
        record: its content, in any of the formats of REQUIRED.
        group_fields: the mapping in which `--group_by` is looked up.
        error: why the row is bad; None if the reader found no fault.
    """

    source: str
    record: Any = None
    group_fields: Any = None
    error: str | None = None


@dataclass(frozen=True)
class Turn:
    """One turn of a conversation.

    Attributes:
        field: its place in the record, for messages.
        parts: typed parts. An image part may carry its own reference in `image`.
    """

    field: str
    role: str
    parts: list[Part]


def conversation(record: Any, rules: ImageRules) -> tuple[list[Message], list[str | bytes]]:
    """`record` as messages of typed parts, and its images in the order of the image parts.

    `<image>` marks become image parts in their places. Images without any mark come before the first user
    text. An image is a path, a URI or encoded bytes.

    Raises:
        RowError: the record cannot be trained on as it is meant; the message names the field.
    """
    if not isinstance(record, Mapping):
        raise RowError(f"the row must be an object with named fields, not {json_type(record)}")
    turns = _turns(record)
    check_order([(turn.field, turn.role) for turn in turns])
    images = _place_images(turns, _record_images(record))
    for turn in turns:
        _check_turn(turn)
    messages = [{"role": turn.role, "content": [_plain(part) for part in turn.parts]} for turn in turns]
    return messages, [_image(value, field, rules) for field, value in images]


def group_of(fields: Any, group_by: str) -> str:
    """The value of the `group_by` field of a row.

    Raises:
        RowError: it is missing, empty or no plain value.
    """
    value = fields.get(group_by)
    if value is None or value == "":
        raise RowError(f"field {group_by!r} (--group_by) is missing or empty: give every row its group")
    if isinstance(value, Mapping | bytes) or (isinstance(value, Sequence) and not isinstance(value, str)):
        raise RowError(f"field {group_by!r} (--group_by) must be a plain value, not {json_type(value)}")
    return check_text(str(value), f"field {group_by!r} (--group_by)")


def check_order(turns: Sequence[tuple[str, str]]) -> None:
    """Check the order of (place, role) pairs: an optional system turn, then user and assistant in turns.

    Raises:
        RowError: the order is another one, or the last turn is not the assistant's.
    """
    dialogue = [turn for turn in turns if turn[1] != "system"]
    if not dialogue:
        raise RowError(f"the conversation has {'only a system turn' if turns else 'no turns'}")
    for field, role in turns[1:]:
        if role == "system":
            raise RowError(f"{field} is a system turn: only the first turn may be one")
    if dialogue[0][1] != "user":
        raise RowError(
            f"{dialogue[0][0]} is an assistant turn with no user turn before it: begin with the user"
        )
    for (_, before), (field, role) in pairwise(dialogue):
        if before == role:
            raise RowError(
                f"{field} is a second {role} turn in a row: join the two, or add the turn between them"
            )
    if dialogue[-1][1] != "assistant":
        raise RowError(
            f"{dialogue[-1][0]}, the last turn, is the user's: "
            "end with an assistant turn, there is nothing to learn after it"
        )


def check_text(text: Any, field: str) -> str:
    """`text` itself.

    Raises:
        RowError: it is no string, or UTF-8 cannot hold it.
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


def split_marks(text: str) -> list[Part]:
    """`text` as text and image parts, with white space next to a mark trimmed and empty texts left out."""
    texts = text.split(IMAGE_MARK)
    parts: list[Part] = []
    for number, between in enumerate(texts):
        parts += [{"type": "image"}] if number else []
        between = between.lstrip() if number else between
        between = between.rstrip() if number < len(texts) - 1 else between
        parts += [{"type": "text", "text": between}] if between.strip() else []
    return parts


def json_type(value: Any) -> str:
    """What `value` is, in the words of JSON."""
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


def _turns(record: Mapping[str, Any]) -> list[Turn]:
    form = next((name for name, fields in REQUIRED.items() if record.get(fields[0]) is not None), None)
    form = form or next((name for name, fields in REQUIRED.items() if fields[0] in record), None)
    if form is None:
        raise RowError(_resemblance(record))
    missing = [field for field in REQUIRED[form] if field not in record]
    if missing:
        raise RowError(f"{form} row without {missing[0]!r}")
    if form == "instruction":
        turns = _instruction(record)
    else:
        turns = [turn for field in REQUIRED[form] for turn in _turn_list(record[field], field)]
    if record.get("system") and turns[:1] and turns[0].role != "system":
        turns.insert(0, Turn("'system'", "system", split_marks(check_text(record["system"], "'system'"))))
    return [turn for turn in turns if turn.parts or turn.role != "system"]


def _instruction(record: Mapping[str, Any]) -> list[Turn]:
    question = _filled(record["instruction"], "'instruction'")
    extra = record.get("input")
    if extra is not None and check_text(extra, "'input'").strip():
        question = f"{question}\n{extra}"
    answer = _filled(record["output"], "'output'")
    return [
        Turn("'instruction'", "user", split_marks(question)),
        Turn("'output'", "assistant", split_marks(answer)),
    ]


def _filled(value: Any, field: str) -> str:
    if not isinstance(value, str) or not value.strip():
        actual = "an empty one" if isinstance(value, str) else json_type(value)
        raise RowError(f"{field} must be a non-empty string, not {actual}")
    return check_text(value, field)


def _turn_list(value: Any, field: str) -> list[Turn]:
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise RowError(f"{field!r} must be a list of turns, not {json_type(value)}")
    return [_turn(turn, f"{field}[{number}]") for number, turn in enumerate(value)]


def _turn(turn: Any, field: str) -> Turn:
    if not isinstance(turn, Mapping):
        raise RowError(f"{field} must be an object with a role and a text, not {json_type(turn)}")
    role_key, text_key = ("from", "value") if "from" in turn else ("role", "content")
    for key in (role_key, text_key):
        if key not in turn:
            raise RowError(f"{field} has no {key!r}")
    role = turn[role_key]
    if not isinstance(role, str) or role not in ROLES:
        raise RowError(f"{field}.{role_key} is {role!r}: it must be one of {', '.join(ROLES)}")
    return Turn(field, ROLES[role], _parts(turn[text_key], f"{field}.{text_key}"))


def _parts(content: Any, field: str) -> list[Part]:
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise RowError(f"{field} must be a string or a list of parts, not {json_type(content)}")
    if isinstance(content, str):
        return split_marks(check_text(content, field))
    return [part for number, part in enumerate(content) for part in _typed_part(part, f"{field}[{number}]")]


def _typed_part(part: Any, field: str) -> list[Part]:
    form = part.get("type") if isinstance(part, Mapping) else None
    if form == "text":
        return split_marks(check_text(part.get("text"), f"{field}.text"))
    if form == "image":
        image = next((part[key] for key in ("image", "path", "url") if part.get(key) is not None), None)
        return [{"type": "image"} if image is None else {"type": "image", "image": image, "field": field}]
    raise RowError(
        f'{field} must be {{"type": "text", "text": …}} or {{"type": "image", "image": …}}, '
        f"not {form or json_type(part)}"
    )


def _record_images(record: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """(field, image) of the record's own image fields."""
    fields = [key for key in ("image", "images") if record.get(key) is not None]
    if len(fields) > 1:
        raise RowError("the row has both 'image' and 'images': keep one")
    if not fields:
        return []
    value = record[fields[0]]
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [(f"{fields[0]}[{number}]", image) for number, image in enumerate(value)]
    return [(fields[0], value)]


def _place_images(turns: list[Turn], images: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """All images in the order of their parts.

    Where the turns have no image part at all, it puts parts for the images before the first user text.
    """
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


def _check_turn(turn: Turn) -> None:
    if turn.role != "user" and any(part["type"] == "image" for part in turn.parts):
        raise RowError(
            f"{turn.field} is a turn of the {turn.role} and holds an image: only user turns may show one"
        )
    if not turn.parts:
        hint = "there is nothing to learn" if turn.role == "assistant" else "say or show something"
        raise RowError(f"{turn.field} is empty: {hint}")


def _plain(part: Part) -> Part:
    return {"type": "image"} if part["type"] == "image" else part


def _image(value: Any, field: str, rules: ImageRules) -> str | bytes:
    if isinstance(value, Mapping):
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
        if value is None:
            raise RowError(f"{field} holds neither bytes nor a path")
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        raise RowError(f"{field} must be a path or bytes, not {json_type(value)}")
    return rules.resolve(value)


def _resemblance(record: Mapping[str, Any]) -> str:
    names = ", ".join(str(name) for name in list(record)[:8]) or "none"
    for form, fields in REQUIRED.items():
        if any(field in record for field in fields):
            return f"looks like an {form} row, but has no {fields[0]!r} (its fields: {names})"
    return (
        "no known row format: it needs 'messages', 'conversations', or 'instruction' and 'output' "
        f"(its fields: {names})"
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
