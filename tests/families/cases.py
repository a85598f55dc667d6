"""The rows that every family is tried on, and the processor's own encoding of them.

Nothing here uses vlmtune: this is the other side of each comparison.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

Message = dict[str, Any]
SIZES = {"wide": (130, 50), "tall": (60, 90), "square": (120, 120), "other": (70, 60)}


@dataclass(frozen=True)
class Case:
    """One row: (role, text) turns; the images stand before the text of the first user turn."""

    turns: tuple[tuple[str, str], ...]
    images: tuple[str, ...] = ()

    @property
    def answers(self) -> list[str]:
        return [text for role, text in self.turns if role == "assistant"]

    def messages(self) -> list[Message]:
        asked = next(index for index, (role, _) in enumerate(self.turns) if role == "user")
        return [
            {
                "role": role,
                "content": [{"type": "image"} for _ in (self.images if index == asked else ())]
                + [{"type": "text", "text": text}],
            }
            for index, (role, text) in enumerate(self.turns)
        ]

    def pixels(self) -> list[Image.Image]:
        return [drawn(name) for name in self.images]


CASES = {
    "single": Case((("user", "how many people are in this image?"), ("assistant", "3")), ("tall",)),
    "long": Case(
        (
            ("user", "what is the colour of the left door?"),
            ("assistant", "The left door is bright and the lamp is dark; nobody waits near the entrance."),
        ),
        ("wide",),
    ),
    "several": Case(
        (
            ("user", "compare the first picture with the second"),
            ("assistant", "fewer visitors, more light"),
        ),
        ("tall", "wide"),
    ),
    "text": Case((("user", "answer with a number: two and one"), ("assistant", "12 persons"))),
    "system": Case(
        (
            ("system", "answer with a number."),
            ("user", "how many people stand near the entrance?"),
            ("assistant", "two"),
        ),
        ("square",),
    ),
    "turns": Case(
        (
            ("user", "how many people are in this queue?"),
            ("assistant", "10"),
            ("user", "is the shop window bright?"),
            ("assistant", "yes, bright"),
        ),
        ("square",),
    ),
}


def drawn(name: str) -> Image.Image:
    """A picture with another gradient in each channel, so that wrong channels, scales and crops show."""
    width, height = SIZES[name]
    y, x = np.mgrid[0:height, 0:width]
    channels = [x * 255 // width, y * 255 // height, (x * 3 + y * 2) % 256]
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


EVALUATED = [
    Case((("user", "is the lamp dark?"), ("assistant", "no, bright")), ("other",)),
    Case((("user", "what is two and two?"), ("assistant", "4"))),
]


def write_rows(folder: Path) -> tuple[Path, Path]:
    """Write train.jsonl with the cases, eval.jsonl with others, and their images; returns the two paths."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in SIZES:
        drawn(name).save(folder / f"{name}.png")
    paths = (folder / "train.jsonl", folder / "eval.jsonl")
    for path, cases in zip(paths, (CASES.values(), EVALUATED), strict=True):
        rows = [
            {"messages": case.messages(), "images": [f"{image}.png" for image in case.images]}
            for case in cases
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return paths


def official(
    processor: Any, cases: Sequence[Case], *, asked: bool = False, **options: bool
) -> dict[str, torch.Tensor]:
    """What the processor's chat path makes of a batch of rows, padded on the right: the model's inputs.

    Args:
        asked: without the last answer, and with the generation prompt.
        options: of the chat template.
    """
    conversations = []
    for case in cases:
        pixels = iter(case.pixels())
        messages = [
            {
                "role": message["role"],
                "content": [
                    {"type": "image", "image": next(pixels)} if part["type"] == "image" else part
                    for part in message["content"]
                ],
            }
            for message in case.messages()
        ]
        conversations.append(messages[:-1] if asked else messages)
    encoded = {
        "tokenize": True,
        "return_dict": True,
        "return_tensors": "pt",
        "processor_kwargs": {"padding": True, "padding_side": "right"},
    }
    return dict(
        processor.apply_chat_template(conversations, add_generation_prompt=asked, **encoded, **options)
    )


def processed(
    processor: Any, texts: Sequence[str], images: Sequence[Sequence[Image.Image]], *, nested: bool = True
) -> dict[str, torch.Tensor]:
    """What the processor makes of a batch of texts that are rendered already."""
    given: dict[str, Any] = {"padding": True, "padding_side": "right"}
    if any(images):
        given["images"] = [list(row) for row in images] if nested else [one for row in images for one in row]
    bos = processor.tokenizer.bos_token
    given["add_special_tokens"] = not (bos and texts[0].startswith(bos))
    return dict(processor(text=list(texts), return_tensors="pt", **given))


def row_losses(model: Any, inputs: dict[str, torch.Tensor], labels: torch.Tensor) -> list[tuple[float, int]]:
    """Summed loss of each row's labelled tokens under the model's own logits, and their number.

    Args:
        labels: `[B, T]`; inputs may be longer, by what the template puts behind the last answer.
    """
    given = {
        name: tensor.float() if tensor.is_floating_point() else tensor
        for name, tensor in inputs.items()
        if name not in ("labels", "text_replacement_offsets")
    }
    with torch.no_grad():
        logits = model(**given, use_cache=False).logits[:, : labels.shape[1] - 1].double().transpose(1, 2)
    losses = torch.nn.functional.cross_entropy(logits, labels[:, 1:], ignore_index=-100, reduction="none")
    counts = (labels[:, 1:] >= 0).sum(1).tolist()
    return list(zip(losses.sum(1).tolist(), counts, strict=True))
