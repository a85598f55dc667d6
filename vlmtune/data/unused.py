"""Finds fields of a row that are not used: reported if harmless, an error if the row would be misread."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from vlmtune.data.image_paths import RowError
from vlmtune.data.names import names_image, names_video

VIDEO_FIELDS = ("video", "videos", "video_path", "audio", "audios")
# Attributes of a turn that say whether it is trained on.
WEIGHTS = ("weight", "loss", "train", "loss_weight")
TOOL_CALLS = ("tool_calls", "function_call", "tool_call_id")
TURN_KEYS = {"role", "content", "from", "value", *WEIGHTS}
IMAGE_HEADS = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"RIFF")
MAX_UNUSED = 50  # unused fields that are reported of one row


def unused_fields(record: Mapping[str, Any], used: Iterable[str], *, has_image: bool) -> list[str]:
    """The fields of a row that are not empty and not used.

    Raises:
        RowError: one of them is an image or a video, without which the row would be misread.
    """
    unused = [str(name) for name in record if name not in used and not is_empty(record[name])]
    if not has_image:
        for name in unused:
            value = record[name]
            if name in VIDEO_FIELDS or _any_in(value, names_video):
                raise RowError(
                    f"field {name!r} holds a video or sound, which is not read there: name videos in "
                    "the field 'videos', or save frames as images"
                )
            if _any_in(value, _is_image):
                raise RowError(
                    f"field {name!r} ({_short(value)}) looks like the row's image, but is not read: "
                    "call it 'image', or take it out"
                )
    return [f"field {name}" for name in unused[:MAX_UNUSED]]


def unused_in_turn(turn: Mapping[str, Any], field: str) -> list[str]:
    """The attributes of a turn that are not used.

    Raises:
        RowError: the turn calls a tool, or has a weight that is not 1.
    """
    for name in TOOL_CALLS:
        if not is_empty(turn.get(name)):
            raise RowError(f"{field}.{name}: calls of tools are not supported; take the row out")
    for name in WEIGHTS:
        if turn.get(name) not in (None, 1, True):
            raise RowError(
                f"{field}.{name} is {turn[name]!r}: every assistant turn is trained on alike; "
                "take the turn out, or its weight"
            )
    return [f"turn attribute {name}" for name in turn if name not in TURN_KEYS and not is_empty(turn[name])]


def is_empty(value: Any) -> bool:
    """Whether a value is null, or an empty text, list or object."""
    return value is None or (isinstance(value, str | bytes | Sequence | Mapping) and not value)


def _any_in(value: Any, test: Any) -> bool:
    """Whether a value, or one inside it, passes the test."""
    if isinstance(value, Mapping):
        return any(test(inner) for inner in value.values())
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return any(_any_in(inner, test) for inner in value[:8])
    return bool(test(value))


def _is_image(value: Any) -> bool:
    if isinstance(value, bytes):
        return value.startswith(IMAGE_HEADS)
    return names_image(value) or (isinstance(value, str) and value.startswith("data:image/"))


def _short(value: Any) -> str:
    if isinstance(value, Mapping):
        return "an image"
    first = value if isinstance(value, str | bytes) else value[0]
    return "an image" if isinstance(first, bytes) else str(first)[:80]
