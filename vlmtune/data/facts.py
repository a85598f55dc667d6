"""Facts about a row that only the preflight shows. They are collected while the row is prepared."""

import hashlib
import re
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
from PIL import Image

from vlmtune.data.languages import script_of_questions

# A line for each row of the store, in the order of its index.
FACTS = pa.schema(
    [
        ("format", pa.string()),  # of the data file: see `Fragment.format`
        ("turns", pa.int32()),  # of user and assistant
        ("image_sizes", pa.list_(pa.string())),  # "WIDTHxHEIGHT" in pixels, upright
        ("image_formats", pa.list_(pa.string())),  # Pillow's name: JPEG, PNG, …
        ("image_hashes", pa.list_(pa.string())),
        ("question", pa.string()),  # hash of the images and of all turns but the assistant's
        ("content", pa.string()),  # hash of the images and of all turns
        ("language", pa.string()),  # language or script of the user's turns, see `languages`
    ]
)


MAX_REASON = 1000  # characters of a reason
MAX_WORD = 600  # characters of a word in it
# A URI, path or file name in a word. Each alternative can match at one place of a word only, so that the time
# for a long word is proportional to its length.
PATH = re.compile(r"(?<!\w)\w+://\S+|^/\S+|^[^/]+/\S+\.\w+|^[\w.-]*\w\.[A-Za-z]\w{1,4}\b")


def shortened(reason: str) -> str:
    """A reason of at most MAX_REASON characters, without the middle of very long words."""
    words = re.split(r"(\s+)", reason[: 50 * MAX_REASON])
    cut = "".join(f"{word[:400]}…{word[-160:]}" if len(word) > MAX_WORD else word for word in words)
    return cut if len(cut) <= MAX_REASON else f"{cut[:MAX_REASON]}…"


def row_facts(
    messages: Sequence[dict[str, Any]],
    images: Sequence[Image.Image],
    image_hashes: Sequence[str],
    video_hashes: Sequence[str] = (),
) -> dict[str, Any]:
    """The facts of one conversation, without its format.

    Args:
        image_hashes: `images.content_hash` of each image.
        video_hashes: hash of the frames of each video.
    """
    hashes = [*image_hashes, *video_hashes]
    prompt = [message for message in messages if message["role"] != "assistant"]
    return {
        "turns": sum(message["role"] != "system" for message in messages),
        "image_sizes": [f"{image.width}x{image.height}" for image in images],
        "image_formats": [image.format or "unknown" for image in images],
        "image_hashes": list(image_hashes),
        "question": _hash(prompt, hashes),
        "content": _hash(messages, hashes),
        "language": script_of_questions(messages),
    }


def error_kind(reason: str) -> str:
    """The reason for a bad row without numbers and paths, which differ from row to row."""
    words = (re.sub(PATH, "…", word) for word in re.split(r"(\s+)", shortened(reason)))
    without_paths = re.sub("…(?: …)+", "…", "".join(words))
    return re.sub(r"(?<![\w-])\d+(?:[.,]\d+)*", "N", without_paths)  # not the 8 of UTF-8


def _hash(messages: Sequence[dict[str, Any]], image_hashes: Sequence[str]) -> str:
    """16 hex digits; equal for equal images, roles and words, however the words are spaced."""
    turns = (f"{message['role']}: {' '.join(_text(message).split())}" for message in messages)
    return hashlib.blake2b("\0".join([*image_hashes, *turns]).encode(), digest_size=8).hexdigest()


def _text(message: dict[str, Any]) -> str:
    return " ".join(part["text"] for part in message["content"] if part["type"] == "text")
