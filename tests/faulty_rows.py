"""A small dataset with known faults, repeats, image sizes and lengths, and where its rows are."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vlmtune.data.store import Store

IMAGE_TOKENS = 16  # of the tiny LLaVA
GOOD, BAD = 24, 9
MANY_IMAGES = 6  # of the last good row


def write_faulty_rows(folder: Path) -> Path:
    """24 good rows, then bad ones: 6 without their image file, 2 without an answer, 1 that is not JSON."""
    for number in range(20):
        size = (64, 48) if number < 15 else (100, 50)
        image = Image.new("RGB", size, (number * 12, 40, 90))
        image.save(folder / f"{number}.{'jpg' if number < 12 else 'png'}")
    rows: list[dict[str, Any]] = [
        {
            "image": f"{number}.{'jpg' if number < 12 else 'png'}",
            "instruction": "How many people?",
            "output": str(number),
        }
        for number in range(20)
    ]
    rows.append({**rows[3], "instruction": "How  many people?"})  # repeats row 4 but for a space
    rows.append({**rows[4], "output": "nobody at all"})  # contradicts row 5
    rows.append({"instruction": "word " * 500, "output": "a long question"})
    rows.append({"images": ["0.jpg"] * MANY_IMAGES, "instruction": "Which are alike?", "output": "all"})
    rows += [
        {"image": f"gone/{number}.jpg", "instruction": "What?", "output": "nothing"} for number in range(6)
    ]
    rows += [{"instruction": "What?"}, {"instruction": "Why?"}]
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{no json\n", encoding="utf-8")
    return path


def row_of(store: Store, data: Path, line: int) -> int:
    """The row number of a line of the file."""
    return int(np.flatnonzero(store.column("source") == f"{data}:{line}")[0])
