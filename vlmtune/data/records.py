"""One raw record, in any understood shape → one conversation with its images, or the reason why not."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vlmtune.data.image_paths import ImagePlace, ImageRules, RowError
from vlmtune.data.marks import IMAGE_MARK, Part, read_other_marks, split_marks
from vlmtune.data.objects import read_objects
from vlmtune.data.row_values import RowNotes, check_text, json_type
from vlmtune.data.splits_given import split_field
from vlmtune.data.turns import Turn, check_order, check_turn, turn_list
from vlmtune.data.unused import is_empty, unused_fields
from vlmtune.data.videos import place_videos, row_videos

Message = dict[str, Any]

EXTRA_FIELDS = {"instruction": ("input", "history"), "messages": (), "LLaVA": (), "prompt/completion": ()}
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
    "history",
    "image",
    "images",
    "objects",
)


@dataclass(frozen=True)
class RawRow:
    """A row as the reader of its file format gives it.

    Attributes:
        source: where a person finds the row, such as FILE:LINE.
        record: its content, in any of the formats of REQUIRED.
        group_fields: the mapping in which `--group_by` is looked up.
        error: why the row is bad; None if the reader found no fault.
        error_kind: the error without names and numbers of this row, under which the report counts it; None
            where `errors.error_kind` can derive it.
        split: the row's split, as the data names it.
    """

    source: str
    record: Any = None
    group_fields: Any = None
    error: str | None = None
    error_kind: str | None = None
    split: str | None = None


@dataclass(frozen=True)
class Conversation:
    """A row that can be trained on.

    Attributes:
        messages: turns of typed parts.
        images: a path, a URI or encoded bytes for each image part, in their order.
        split: train, eval or test, where a field of the row says it.
        unused: the names of fields and of attributes of turns that hold something and are not used.
        notes: what was read differently from how it is written, such as a mark of another program; without
            names and numbers of this row.
        hints: by path of an image, what to do if there is no such file.
        by_name: by path of an image that was found by its file name alone, the path that the row has.
        objects: boxes and points for the marks in the texts, see `objects.read_objects`.
        videos: a path or a URI for each video part, in their order.
    """

    messages: list[Message]
    images: list[str | bytes]
    split: str | None = None
    unused: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    hints: dict[str, str] = field(default_factory=dict)
    by_name: dict[str, str] = field(default_factory=dict)
    objects: dict[str, Any] | None = None
    videos: tuple[str, ...] = ()


def conversation(
    record: Any, rules: ImageRules, used: Sequence[str] = (), *, answered: bool = True
) -> Conversation:
    """`record` as messages of typed parts, with its images in the order of the image parts.

    `<image>` marks become image parts in their places. Images without any mark come before the first user
    text.

    Args:
        used: further fields of the row that something uses.
        answered: the last answer is the row's own. Boxes of one that is missing may be left over.

    Raises:
        RowError: the record cannot be trained on as it is meant; the message names the field.
    """
    if not isinstance(record, Mapping):
        raise RowError(f"the row must be an object with named fields, not {json_type(record)}")
    row_notes = RowNotes()
    form = _form(record)
    turns = _turns(record, form, row_notes)
    check_order([(turn.field, turn.role) for turn in turns])
    images = _place_images(turns, _record_images(record), row_notes)
    video_field, videos = row_videos(record)
    videos = place_videos(
        [turn.parts for turn in turns if turn.role == "user"], videos, has_image=bool(images)
    )
    for turn in turns:
        check_turn(turn, record, row_notes)
    texts = [part["text"] for turn in turns for part in turn.parts if part["type"] == "text"]
    objects = read_objects(record.get("objects"), texts, len(images), row_notes, answered=answered)
    messages = [{"role": turn.role, "content": [_plain(part) for part in turn.parts]} for turn in turns]
    located_videos = [_video(video, rules) for video in videos]
    located = [*(_locate(value, name, rules) for name, value in images), *located_videos]
    for file in located:
        row_notes.note(None if isinstance(file, bytes) else file.note)
    split = split_field(record)
    known = {
        *REQUIRED[form],
        *EXTRA_FIELDS[form],
        *used,
        "system",
        "image",
        "images",
        "objects",
        *([video_field] if video_field is not None and videos else ()),
    }
    row_notes.unused += unused_fields(
        record, known | ({split[0]} if split else set()), has_image=bool(images or videos)
    )
    written = [*(value for _, value in images), *videos]
    return Conversation(
        messages,
        [file if isinstance(file, bytes) else file.path for file in located[: len(images)]],
        split[1] if split else None,
        tuple(row_notes.unused),
        tuple(row_notes.notes),
        {file.path: file.hint for file in located if not isinstance(file, bytes) and file.hint},
        {
            file.path: str(value)
            for file, value in zip(located, written, strict=True)
            if not isinstance(file, bytes) and file.by_name
        },
        objects,
        tuple(video.path for video in located_videos),
    )


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


def _form(record: Mapping[str, Any]) -> str:
    """The row's format: a key of REQUIRED.

    Raises:
        RowError: it is in none, or lacks a field.
    """
    form = next((name for name, fields in REQUIRED.items() if record.get(fields[0]) is not None), None)
    form = form or next((name for name, fields in REQUIRED.items() if fields[0] in record), None)
    if form is None:
        raise RowError(_resemblance(record))
    missing = [field for field in REQUIRED[form] if field not in record]
    if missing:
        raise RowError(f"{form} row without {missing[0]!r}")
    return form


def _turns(record: Mapping[str, Any], form: str, row_notes: RowNotes) -> list[Turn]:
    if form == "instruction":
        turns = _instruction(record, row_notes)
    else:
        turns = [turn for field in REQUIRED[form] for turn in turn_list(record[field], field, row_notes)]
    if record.get("system") and turns[:1] and turns[0].role != "system":
        turns.insert(0, Turn("'system'", "system", split_marks(check_text(record["system"], "'system'"))))
    return [turn for turn in turns if turn.parts or turn.role != "system"]


def _instruction(record: Mapping[str, Any], row_notes: RowNotes) -> list[Turn]:
    question = _filled(record["instruction"], "'instruction'", row_notes)
    extra = record.get("input")
    if extra is not None and (extra := row_notes.text(extra, "'input'")).strip():
        question = f"{question}\n{extra}"
    answer = _filled(record["output"], "'output'", row_notes)
    return [
        *_history(record.get("history"), row_notes),
        Turn("'instruction'", "user", split_marks(question, "'instruction'")),
        Turn("'output'", "assistant", split_marks(answer, "'output'")),
    ]


def _history(value: Any, row_notes: RowNotes) -> list[Turn]:
    """The earlier turns of Alpaca's `history`: [[question, answer], …]."""
    turns = []
    for number, pair in enumerate([] if is_empty(value) else value):
        if isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != 2:
            raise RowError(f"history[{number}] must be a question and its answer: [question, answer]")
        for index, role in enumerate(("user", "assistant")):
            field = f"history[{number}][{index}]"
            turns.append(Turn(field, role, split_marks(_filled(pair[index], field, row_notes), field)))
    return turns


def _filled(value: Any, field: str, row_notes: RowNotes) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return row_notes.text(value, field)
    if not isinstance(value, str) or not value.strip():
        actual = "an empty one" if isinstance(value, str) else json_type(value)
        hint = ': write the word that is meant, such as "yes"' if isinstance(value, bool) else ""
        raise RowError(f"{field} must be a non-empty string, not {actual}{hint}")
    return check_text(value, field)


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


def _place_images(
    turns: list[Turn], images: list[tuple[str, Any]], row_notes: RowNotes
) -> list[tuple[str, Any]]:
    """All images in the order of their parts.

    Where the turns have no image part at all, it takes other programs' marks, or puts parts for the images
    before the first user text.
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
    """Turn the marks of other programs in user texts into image parts."""
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


def _plain(part: Part) -> Part:
    return part if part["type"] == "text" else {"type": part["type"]}


def _video(reference: str, rules: ImageRules) -> ImagePlace:
    try:
        return rules.locate(reference)
    except RowError as error:
        message = str(error)
        raise RowError(message.replace("image ", "video ")) from error


def _locate(value: Any, field: str, rules: ImageRules) -> ImagePlace | bytes:
    """The path or URI of an image, or its encoded bytes."""
    if isinstance(value, Mapping):
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
        if value is None:
            raise RowError(f"{field} holds neither bytes nor a path")
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        raise RowError(f"{field} must be a path or bytes, not {json_type(value)}")
    return rules.locate(value)


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
