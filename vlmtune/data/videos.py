"""Finds the videos of a row, and their places in its texts."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from vlmtune.data.image_paths import RowError
from vlmtune.data.marks import Part
from vlmtune.data.names import names_video
from vlmtune.data.row_values import json_type
from vlmtune.data.unused import is_empty

VIDEO_FIELDS = ("videos", "video", "video_path")
MARK = re.compile(r"\s*<video>\s*", re.IGNORECASE)


def row_videos(record: Mapping[str, Any]) -> tuple[str | None, list[str]]:
    """The field of a row that holds its videos, and their paths as the row writes them.

    Raises:
        RowError: the row has several such fields, or they contain anything but paths.
    """
    fields = [name for name in VIDEO_FIELDS if not is_empty(record.get(name))]
    if not fields:
        return None, []
    if len(fields) > 1:
        raise RowError(f"the row has both {fields[0]!r} and {fields[1]!r}: keep one")
    value = record[fields[0]]
    videos = list(value) if isinstance(value, Sequence) and not isinstance(value, str | bytes) else [value]
    for number, video in enumerate(videos):
        place = f"{fields[0]}[{number}]"
        if isinstance(video, Mapping):
            video = videos[number] = video.get("path")
        if not isinstance(video, str) or not video.strip():
            raise RowError(f"{place} must be the path of a video file, not {json_type(video)}")
        if not names_video(video):
            raise RowError(f"{place} ({video[:80]}) has no ending of a video file, such as .mp4")
    return fields[0], videos


def place_videos(
    user_parts: Sequence[list[Part]], videos: Sequence[str], *, has_image: bool = False
) -> list[str]:
    """Turn `<video>` marks in the parts of user turns into video parts.

    Without marks, the videos come before the text; but if the row has an image, they are then not used.

    Returns:
        The paths of all videos in the order of their parts.

    Raises:
        RowError: the numbers of marks and videos differ.
    """
    typed = [part for parts in user_parts for part in parts if part["type"] == "video"]
    if not videos and not typed:
        return []
    marks = 0
    for parts in user_parts:
        parts[:] = [new for part in parts for new in _split(part)]
        marks += sum(part["type"] == "video" and "video" not in part for part in parts)
    if not marks and not typed and has_image:
        return []
    if not marks and not typed:
        user_parts[0][:0] = [{"type": "video"} for _ in videos]
        return list(videos)
    if marks != len(videos):
        raise RowError(
            f"{marks} <video> mark{'' if marks == 1 else 's'} but {len(videos)} "
            f"video{'' if len(videos) == 1 else 's'}: give each video one mark, or no marks at all"
        )
    unplaced = iter(videos)
    return [
        str(part["video"]) if "video" in part else next(unplaced)
        for parts in user_parts
        for part in parts
        if part["type"] == "video"
    ]


def _split(part: Part) -> list[Part]:
    """A text part split into text and video parts at its marks; any other part unchanged."""
    if part["type"] != "text" or not MARK.search(part["text"]):
        return [part]
    texts = MARK.split(part["text"])
    found: list[Part] = []
    for number, text in enumerate(texts):
        found += [{"type": "video"}] if number else []
        found += [{"type": "text", "text": text}] if text.strip() else []
    return found
