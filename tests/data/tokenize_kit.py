"""Conversations to encode, their images, and encoders."""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vlmtune.data.encoded_example import (
    EncodedExample,
)
from vlmtune.data.tokenize import RowEncoder
from vlmtune.model_ref import ModelRef

Message = dict[str, Any]

IMAGE_PART = {"type": "image"}


def turn(role: str, *parts: Any) -> Message:
    return {
        "role": role,
        "content": [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts],
    }


CONVERSATIONS: dict[str, list[Message]] = {
    "one turn": [turn("user", IMAGE_PART, "How many people?"), turn("assistant", "There are five people.")],
    "a number": [turn("user", IMAGE_PART, "How many people?"), turn("assistant", "5")],
    "Korean": [
        turn("user", IMAGE_PART, "이 사진에 사람이 몇 명 있습니까?"),
        turn("assistant", "모두 7명입니다. 😀"),
    ],
    "text only": [
        turn("user", "What is a beam?"),
        turn("assistant", "A horizontal member.\nIt carries the floor."),
    ],
    "system and three turns": [
        turn("system", "Answer with a number."),
        turn("user", "Look.", IMAGE_PART, "How many?"),
        turn("assistant", "3 people"),
        turn("user", "And children?"),
        turn("assistant", "1 child"),
        turn("user", "So adults?"),
        turn("assistant", "2 adults"),
    ],
    "two images": [
        turn("user", IMAGE_PART, IMAGE_PART, "Which is busier?"),
        turn("assistant", "The second."),
    ],
    "images in later turns": [
        turn("user", "Look at two images."),
        turn("assistant", "Show me."),
        turn("user", IMAGE_PART, "One."),
        turn("assistant", "I see."),
        turn("user", IMAGE_PART, "Two. Same place?"),
        turn("assistant", "Yes, the food court."),
    ],
}


def noise_image(width: int = 90, height: int = 60, seed: int = 0) -> Image.Image:
    pixels = np.random.RandomState(seed).randint(0, 256, (height, width, 3))
    return Image.fromarray(pixels.astype(np.uint8))


def images_for(messages: list[Message]) -> list[Image.Image]:
    """An image for each image part, each of another shape."""
    number = sum(part["type"] == "image" for message in messages for part in message["content"])
    return [noise_image(90 - 30 * index, 60 + 20 * index, index) for index in range(number)]


@cache
def encoder_of(folder: Path, template: str | None = None) -> RowEncoder:
    processor = ModelRef(str(folder)).processor()
    if template is not None:
        processor.chat_template = template
    return RowEncoder(processor)


def texts_of(messages: list[Message], *roles: str) -> list[str]:
    return [
        " ".join(part["text"] for part in m["content"] if part["type"] == "text")
        for m in messages
        if m["role"] in roles
    ]


def runs(positions: np.ndarray) -> list[np.ndarray]:
    """Rising positions, cut where they do not follow on each other."""
    return [run for run in np.split(positions, np.flatnonzero(np.diff(positions) > 1) + 1) if len(run)]


def decoded(encoder: RowEncoder, example: EncodedExample, kind: int) -> list[str]:
    return [
        encoder.tokenizer.decode(example.input_ids[run])
        for run in runs(np.flatnonzero(example.kinds == kind))
    ]


def letters(texts: list[str]) -> str:
    return "".join("".join(texts).split())
