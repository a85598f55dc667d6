"""Small data files with images, and what the store of such a file holds."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vlmtune.data.encoded_example import ANSWER
from vlmtune.data.store import Store
from vlmtune.data.tokenize import RowEncoder

COUNTS = [3, 0, 7, 5, 2, 9, 4, 1]  # of people, one an image


def noise_image(seed: int) -> Image.Image:
    return Image.fromarray(np.random.RandomState(seed).randint(0, 256, (30, 40, 3)).astype(np.uint8))


def write_images(folder: Path, number: int = len(COUNTS)) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(number):
        noise_image(index).save(folder / f"{index:03d}.png")
    return [f"{folder.name}/{index:03d}.png" for index in range(number)]


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.write_text(
        "".join(
            (row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)) + "\n" for row in rows
        ),
        "utf-8",
    )
    return path


def counted(folder: Path) -> list[dict[str, Any]]:
    """Instruction rows about the images of a new folder beside them."""
    return [
        {"instruction": "How many people?", "output": f"{count} people", "image": image}
        for image, count in zip(write_images(folder / "images"), COUNTS, strict=True)
    ]


def answers(store: Store, encoder: RowEncoder) -> list[list[str]]:
    """What is trained on in each row, decoded; turn by turn."""
    found = []
    for example in store.read(range(store.meta.rows)):
        positions = np.flatnonzero(example.kinds == ANSWER)
        turns = np.split(positions, np.flatnonzero(np.diff(positions) > 1) + 1)
        found.append([encoder.tokenizer.decode(example.input_ids[turn]) for turn in turns])
    return found


def splits_of(store: Store) -> dict[str, str]:
    return dict(zip(store.column("source"), store.column("split"), strict=True))


def instruction_jsonl(folder: Path) -> Path:
    return write_lines(folder / "data.jsonl", counted(folder))
