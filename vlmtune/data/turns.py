"""Turns of a conversation, as the rows of data files write them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from vlmtune.data.image_paths import RowError
from vlmtune.data.marks import END_TOKEN, VIDEO_MARK, Part, split_marks
from vlmtune.data.row_values import RowNotes, check_text, json_type
from vlmtune.data.unused import VIDEO_FIELDS, is_empty, unused_in_turn

# Names of roles in data files, in lower case; any case is accepted.
ROLES = {
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "bot", "chatgpt"), "assistant"),
    "system": "system",
}
TOOL_ROLES = ("tool", "function", "observation", "function_call", "ipython", "environment")
# Words that programs write for a missing value. In an answer they may also be meant literally.
NO_VALUE = {"nan", "null", "none", "<na>", "n/a"}


@dataclass(frozen=True)
class Turn:
    """One turn of a conversation.

    Attributes:
        field: its place in the record, for messages.
        parts: typed parts. An image part may have the path of its image in `image`.
    """

    field: str
    role: str
    parts: list[Part]


def check_order(turns: Sequence[tuple[str, str]]) -> None:
    """Check the order of (place, role) pairs: an optional system turn, then user and assistant alternating.

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


def turn_list(value: Any, field: str, row_notes: RowNotes) -> list[Turn]:
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise RowError(f"{field!r} must be a list of turns, not {json_type(value)}")
    return [_turn(turn, f"{field}[{number}]", row_notes) for number, turn in enumerate(value)]


def _turn(turn: Any, field: str, row_notes: RowNotes) -> Turn:
    if not isinstance(turn, Mapping):
        raise RowError(f"{field} must be an object with a role and a text, not {json_type(turn)}")
    role_key, text_key = ("from", "value") if "from" in turn else ("role", "content")
    for key in (role_key, text_key):
        if key not in turn:
            raise RowError(f"{field} has no {key!r}")
    role = turn[role_key]
    if isinstance(role, str) and role.lower() in TOOL_ROLES:
        raise RowError(f"{field}.{role_key} is {role!r}: calls of tools are not supported; take the row out")
    if not isinstance(role, str) or role.lower() not in ROLES:
        raise RowError(f"{field}.{role_key} is {role!r}: it must be one of {', '.join(ROLES)}")
    row_notes.unused += [name for name in unused_in_turn(turn, field) if name not in row_notes.unused]
    return Turn(field, ROLES[role.lower()], _parts(turn[text_key], f"{field}.{text_key}", row_notes))


def _parts(content: Any, field: str, row_notes: RowNotes) -> list[Part]:
    if isinstance(content, int | float) and not isinstance(content, bool):
        content = row_notes.text(content, field)
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise RowError(f"{field} must be a string or a list of parts, not {json_type(content)}")
    if isinstance(content, str):
        return split_marks(check_text(content, field), field)
    return [part for number, part in enumerate(content) for part in _typed_part(part, f"{field}[{number}]")]


def _typed_part(part: Any, field: str) -> list[Part]:
    form = part.get("type") if isinstance(part, Mapping) else None
    if form == "text":
        return split_marks(check_text(part.get("text"), f"{field}.text"), f"{field}.text")
    if form == "image":
        image = next((part[key] for key in ("image", "path", "url") if part.get(key) is not None), None)
        return [{"type": "image"} if image is None else {"type": "image", "image": image, "field": field}]
    if form == "video":
        video = next((part[key] for key in ("video", "path", "url") if part.get(key) is not None), None)
        if video is not None and not isinstance(video, str):
            raise RowError(f"{field}.video must be the path of a video file, not {json_type(video)}")
        return [{"type": "video"} if video is None else {"type": "video", "video": video}]
    raise RowError(
        f'{field} must be {{"type": "text", "text": …}} or {{"type": "image", "image": …}}, '
        f"not {form or json_type(part)}"
    )


def check_turn(turn: Turn, record: Mapping[str, Any], row_notes: RowNotes) -> None:
    media = next((part["type"] for part in turn.parts if part["type"] != "text"), None)
    if turn.role != "user" and media is not None:
        thing = "an image" if media == "image" else f"a {media}"
        raise RowError(
            f"{turn.field} is a turn of the {turn.role} and holds {thing}: only user turns may show one"
        )
    if not turn.parts:
        hint = "there is nothing to learn" if turn.role == "assistant" else "say or show something"
        raise RowError(f"{turn.field} is empty: {hint}")
    text = "".join(part.get("text", "") for part in turn.parts)
    if turn.role == "user" and (mark := VIDEO_MARK.search(text)):
        word = mark.group().strip()
        if any(not is_empty(record.get(name)) for name in VIDEO_FIELDS) or "|" in word:
            raise RowError(f"{turn.field} holds {word}: name videos in the field 'videos'; sound is not read")
        row_notes.note(f"{word} stands in a question and is read as text")
    if turn.role == "assistant":
        if token := END_TOKEN.search(text):
            row_notes.note(
                f"{token.group()}, an end token of some models, stands in an answer and is learnt as text"
            )
        if text.strip().lower() in NO_VALUE:
            row_notes.note(f"an answer is {text.strip()!r} and is learnt as this word")
