"""Turn one raw record, in any known row format, into a conversation with its images."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vlmtune.data.image_paths import ImageRules, RowError
from vlmtune.data.marks import Part, split_marks
from vlmtune.data.objects import read_objects
from vlmtune.data.row_images import locate_image, locate_video, place_images, record_images
from vlmtune.data.row_values import RowNotes, check_text, json_type
from vlmtune.data.splits_given import split_field
from vlmtune.data.turns import Turn, check_order, check_turn, turn_list
from vlmtune.data.unused import is_empty, unused_fields
from vlmtune.data.videos import place_videos, row_videos

Message = dict[str, Any]

# Fields that a row of each row format may have and must have. A row is of the first format whose first
# required
# field it has.
OPTIONAL_FIELDS = {"instruction": ("input", "history"), "messages": (), "LLaVA": (), "prompt/completion": ()}
REQUIRED_FIELDS = {
    "messages": ("messages",),
    "LLaVA": ("conversations",),
    "prompt/completion": ("prompt", "completion"),
    "instruction": ("instruction", "output"),
}
# Columns of Parquet and Hugging Face datasets that are read whatever their type: a row may consist of them.
CONTENT_FIELDS = (
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
    """A row as the reader of its file format returns it.

    Attributes:
        source: where a person finds the row, such as FILE:LINE.
        record: its content, in one of the row formats of REQUIRED_FIELDS.
        group_fields: the mapping that may have the field of `--group_by`.
        error: why the row is bad; None if the reader found no fault.
        error_kind: the error without names and numbers of this row, under which the report counts it; None
            where `errors.error_kind` can derive it.
        split: the name that the data gives the row's split, such as "validation".
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
        messages: turns, each with a list of typed parts, as chat templates take them.
        images: a path, a URI or encoded bytes for each image part, in the order of the parts.
        split: train, eval or test, where a field of the row says it.
        unused: names of the row's fields, and of attributes of its turns, that have a value and are not used.
        reading_notes: values that are read differently from how they are written, such as the image mark of
            another program. The notes of two rows are equal if they are about the same thing.
        hints: what a user can do if an image file does not exist; the key is the image's path.
        found_by_name: images that were found by their file name alone, not at the path that the row has: the
            key is the path where the image is, the value the path in the row.
        objects: boxes and points for the marks in the texts, see `objects.read_objects`.
        videos: a path or a URI for each video part, in the order of the parts.
    """

    messages: list[Message]
    images: list[str | bytes]
    split: str | None = None
    unused: tuple[str, ...] = ()
    reading_notes: tuple[str, ...] = ()
    hints: dict[str, str] = field(default_factory=dict)
    found_by_name: dict[str, str] = field(default_factory=dict)
    objects: dict[str, Any] | None = None
    videos: tuple[str, ...] = ()


def conversation(
    record: Any, rules: ImageRules, used_fields: Sequence[str] = (), *, has_answer: bool = True
) -> Conversation:
    """Turn `record` into messages of typed parts, with its images in the order of the image parts.

    `<image>` marks become image parts in their places. Images without any mark come before the first user
    text.

    Args:
        used_fields: names of further fields that something reads, such as `--group_by`.
        has_answer: whether the last answer is the row's own. Without it, some boxes may have no mark.

    Raises:
        RowError: the record cannot be trained on as it is meant; the message names the field.
    """
    if not isinstance(record, Mapping):
        raise RowError(f"the row must be an object with named fields, not {json_type(record)}")
    row_notes = RowNotes()
    row_format = _row_format(record)
    turns = _turns(record, row_format, row_notes)
    check_order([(turn.field, turn.role) for turn in turns])
    images = place_images(turns, record_images(record), row_notes)
    video_field, videos = row_videos(record)
    videos = place_videos(
        [turn.parts for turn in turns if turn.role == "user"], videos, has_image=bool(images)
    )
    for turn in turns:
        check_turn(turn, record, row_notes)
    texts = [part["text"] for turn in turns for part in turn.parts if part["type"] == "text"]
    objects = read_objects(record.get("objects"), texts, len(images), row_notes, has_answer=has_answer)
    messages = [{"role": turn.role, "content": [_plain(part) for part in turn.parts]} for turn in turns]
    located_videos = [locate_video(video, rules) for video in videos]
    located = [*(locate_image(value, name, rules) for name, value in images), *located_videos]
    for file in located:
        row_notes.note(None if isinstance(file, bytes) else file.note)
    split = split_field(record)
    known = {
        *REQUIRED_FIELDS[row_format],
        *OPTIONAL_FIELDS[row_format],
        *used_fields,
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
        tuple(row_notes.reading_notes),
        {file.path: file.hint for file in located if not isinstance(file, bytes) and file.hint},
        {
            file.path: str(value)
            for file, value in zip(located, written, strict=True)
            if not isinstance(file, bytes) and file.found_by_name
        },
        objects,
        tuple(video.path for video in located_videos),
    )


def group_of(fields: Any, group_by: str) -> str:
    """The value of the `group_by` field of a row.

    Raises:
        RowError: the value is missing, empty, or a list or object.
    """
    value = fields.get(group_by)
    if value is None or value == "":
        raise RowError(f"field {group_by!r} (--group_by) is missing or empty: give every row its group")
    if isinstance(value, Mapping | bytes) or (isinstance(value, Sequence) and not isinstance(value, str)):
        raise RowError(f"field {group_by!r} (--group_by) must be a plain value, not {json_type(value)}")
    return check_text(str(value), f"field {group_by!r} (--group_by)")


def _row_format(record: Mapping[str, Any]) -> str:
    """The row format of a record: a key of REQUIRED_FIELDS.

    Raises:
        RowError: the record has no known format, or lacks a required field.
    """
    row_format = next(
        (name for name, fields in REQUIRED_FIELDS.items() if record.get(fields[0]) is not None), None
    )
    row_format = row_format or next(
        (name for name, fields in REQUIRED_FIELDS.items() if fields[0] in record), None
    )
    if row_format is None:
        raise RowError(_resemblance(record))
    missing = [field for field in REQUIRED_FIELDS[row_format] if field not in record]
    if missing:
        raise RowError(f"{row_format} row without {missing[0]!r}")
    return row_format


def _turns(record: Mapping[str, Any], row_format: str, row_notes: RowNotes) -> list[Turn]:
    if row_format == "instruction":
        turns = _instruction(record, row_notes)
    else:
        turns = [
            turn
            for field in REQUIRED_FIELDS[row_format]
            for turn in turn_list(record[field], field, row_notes)
        ]
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


def _plain(part: Part) -> Part:
    return part if part["type"] == "text" else {"type": part["type"]}


def _resemblance(record: Mapping[str, Any]) -> str:
    names = ", ".join(str(name) for name in list(record)[:8]) or "none"
    for row_format, fields in REQUIRED_FIELDS.items():
        if any(field in record for field in fields):
            return f"looks like an {row_format} row, but has no {fields[0]!r} (its fields: {names})"
    return (
        "no known row format: it needs 'messages', 'conversations', or 'instruction' and 'output' "
        f"(its fields: {names})"
    )
