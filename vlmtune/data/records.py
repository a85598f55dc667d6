"""One raw record, in any of the understood shapes → one conversation with its images, or the reason why it
is none."""

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
# Fields that a row of each format must have; the first format whose first field is there is the row's.
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
    """A record as a reader found it. `source`: its place for people; `labels`: where its group is looked up;
    `error`: why it is bad."""

    source: str
    record: Any = None
    labels: Any = None
    error: str | None = None


@dataclass(frozen=True)
class Turn:
    """One turn of a conversation. `field`: where it stands in the record; image parts may carry their own
    reference in `image`."""

    field: str
    role: str
    parts: list[Part]


def conversation(record: Any, rules: ImageRules) -> tuple[list[Message], list[str | bytes]]:
    """`record` as messages of typed parts, and its images (paths, URIs or encoded bytes) in the order of the
    image parts.

    `<image>` marks become image parts where they stand; images without any mark stand before the first user
    text.
    Raises RowError, naming the field, for everything that could not be trained on as it is meant.
    """
    if not isinstance(record, Mapping):
        raise RowError(f"the row must be an object with named fields, not {kind(record)}")
    turns = _turns(record)
    check_order([(turn.field, turn.role) for turn in turns])
    images = _place_images(turns, _record_images(record))
    for turn in turns:
        _check_turn(turn)
    resolved = [_image(value, field, rules) for field, value in images]
    messages = [{"role": turn.role, "content": [_plain(part) for part in turn.parts]} for turn in turns]
    return messages, resolved


def group_of(labels: Any, group_by: str) -> str:
    """The value of the `group_by` field of a row. Raises RowError where it is missing, empty or no plain
    value."""
    value = labels.get(group_by)
    if value is None or value == "":
        raise RowError(f"field {group_by!r} (--group_by) is missing or empty: give every row its group")
    if isinstance(value, Mapping | bytes) or (isinstance(value, Sequence) and not isinstance(value, str)):
        raise RowError(f"field {group_by!r} (--group_by) must be a plain value, not {kind(value)}")
    return check_text(str(value), f"field {group_by!r} (--group_by)")


def check_order(turns: Sequence[tuple[str, str]]) -> None:
    """Holds (place, role) pairs to: perhaps one system turn, then user and assistant in turns, an assistant
    at the end. Raises RowError."""
    spoken = [turn for turn in turns if turn[1] != "system"]
    if not spoken:
        raise RowError(
            "the conversation has no turns" if not turns else "the conversation has only a system turn"
        )
    for field, role in turns[1:]:
        if role == "system":
            raise RowError(f"{field} is a system turn: only the first turn may be one")
    if spoken[0][1] != "user":
        raise RowError(
            f"{spoken[0][0]} is an assistant turn with no user turn before it: begin with the user"
        )
    for (_, before), (field, role) in pairwise(spoken):
        if before == role:
            raise RowError(
                f"{field} is a second {role} turn in a row: join the two, or add the turn between them"
            )
    if spoken[-1][1] != "assistant":
        raise RowError(
            f"{spoken[-1][0]}, the last turn, is the user's: end with an assistant turn, there is nothing to learn after it"
        )


def check_text(text: Any, field: str) -> str:
    """`text` if it is a string that UTF-8 can hold, else RowError."""
    if not isinstance(text, str):
        raise RowError(f"{field} must be a string, not {kind(text)}")
    broken = re.search("[\ud800-\udfff]", text)
    if broken and "\udc80" <= broken.group() <= "\udcff":
        raise RowError(f"{field} holds bytes that are not UTF-8: save the file as UTF-8")
    if broken:
        raise RowError(
            f"{field} holds half a character (\\u{ord(broken.group()):04x} without its pair): write the character whole"
        )
    return text


def split_marks(text: str) -> list[Part]:
    """`text` as text and image parts, whitespace next to a mark trimmed and empty texts left out."""
    pieces = text.split(IMAGE_MARK)
    parts: list[Part] = []
    for number, piece in enumerate(pieces):
        parts += [{"type": "image"}] if number else []
        piece = piece.lstrip() if number else piece
        piece = piece.rstrip() if number < len(pieces) - 1 else piece
        parts += [{"type": "text", "text": piece}] if piece.strip() else []
    return parts


def kind(value: Any) -> str:
    """What `value` is, in the words of JSON."""
    names = (
        (type(None), "null"),
        (bool, "a boolean"),
        (int | float, "a number"),
        (str, "a string"),
        (bytes, "bytes"),
        (Mapping, "an object"),
    )
    return next(
        (name for form, name in names if isinstance(value, form)),
        "a list" if isinstance(value, Sequence) else type(value).__name__,
    )


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
        raise RowError(
            f"{field} must be a non-empty string, not {kind(value) if not isinstance(value, str) else 'an empty one'}"
        )
    return check_text(value, field)


def _turn_list(value: Any, field: str) -> list[Turn]:
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise RowError(f"{field!r} must be a list of turns, not {kind(value)}")
    return [_turn(turn, f"{field}[{number}]") for number, turn in enumerate(value)]


def _turn(turn: Any, field: str) -> Turn:
    if not isinstance(turn, Mapping):
        raise RowError(f"{field} must be an object with a role and a text, not {kind(turn)}")
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
        raise RowError(f"{field} must be a string or a list of parts, not {kind(content)}")
    if isinstance(content, str):
        return split_marks(check_text(content, field))
    return [part for number, part in enumerate(content) for part in _typed_part(part, f"{field}[{number}]")]


def _typed_part(part: Any, field: str) -> list[Part]:
    form = part.get("type") if isinstance(part, Mapping) else None
    if form == "text":
        return split_marks(check_text(part.get("text"), f"{field}.text"))
    if form == "image":
        own = next((part[key] for key in ("image", "path", "url") if part.get(key) is not None), None)
        return [{"type": "image"} if own is None else {"type": "image", "image": own, "field": field}]
    raise RowError(
        f'{field} must be {{"type": "text", "text": …}} or {{"type": "image", "image": …}}, not {form or kind(part)}'
    )


def _record_images(record: Mapping[str, Any]) -> list[tuple[str, Any]]:
    given = [key for key in ("image", "images") if record.get(key) is not None]
    if len(given) > 1:
        raise RowError("the row has both 'image' and 'images': keep one")
    if not given:
        return []
    value = record[given[0]]
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [(f"{given[0]}[{number}]", image) for number, image in enumerate(value)]
    return [(given[0], value)]


def _place_images(turns: list[Turn], images: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """All images in the order of their parts; with no image part at all, puts parts for them before the
    first user text."""
    parts = [part for turn in turns for part in turn.parts if part["type"] == "image"]
    if not parts:
        first = next(turn for turn in turns if turn.role == "user")
        first.parts[:0] = [{"type": "image"} for _ in images]
        return images
    marks = sum("image" not in part for part in parts)
    if marks != len(images):
        raise RowError(
            f"{_count(marks, IMAGE_MARK + ' mark')} but {_count(len(images), 'image')}: give each image one mark, or no marks at all"
        )
    following = iter(images)
    return [
        (f"{part['field']}.image", part["image"]) if "image" in part else next(following) for part in parts
    ]


def _check_turn(turn: Turn) -> None:
    if turn.role != "user" and any(part["type"] == "image" for part in turn.parts):
        raise RowError(
            f"{turn.field} is a turn of the {turn.role} and holds an image: only user turns may show one"
        )
    if not turn.parts:
        raise RowError(
            f"{turn.field} is empty"
            + (": there is nothing to learn" if turn.role == "assistant" else ": say or show something")
        )


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
        raise RowError(f"{field} must be a path or bytes, not {kind(value)}")
    return rules.resolve(value)


def _resemblance(record: Mapping[str, Any]) -> str:
    names = ", ".join(str(name) for name in list(record)[:8]) or "none"
    for form, fields in REQUIRED.items():
        if any(field in record for field in fields):
            return f"looks like an {form} row, but has no {fields[0]!r} (its fields: {names})"
    return f"no known row format: it needs 'messages', 'conversations', or 'instruction' and 'output' (its fields: {names})"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
