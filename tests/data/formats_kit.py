"""Data files to read, and their rows."""

import json
import pickle
from pathlib import Path
from typing import Any

from PIL import Image

from vlmtune.data.formats import read_fragment
from vlmtune.data.scan import scan

Row = dict[str, Any]

IMAGE = {"type": "image"}


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def turn(role: str, *parts: Any) -> Row:
    return {"role": role, "content": [text(part) if isinstance(part, str) else part for part in parts]}


def png(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), "red").save(path)
    return path


# What a row is trained on; the other keys tell how it was read.
TRAINED = ("source", "messages", "images", "group", "error")


def read_whole(path: Path | str, **options: Any) -> list[Row]:
    """All rows with what is told of them, read from pickled fragments as a worker would."""
    return [
        row
        for fragment in scan(str(path), **options)
        for row in read_fragment(pickle.loads(pickle.dumps(fragment)))
    ]


def read(path: Path | str, **options: Any) -> list[Row]:
    """All rows without what is told of them."""
    return [{name: row[name] for name in TRAINED} for row in read_whole(path, **options)]


def read_good(path: Path | str, **options: Any) -> list[Row]:
    rows = read(path, **options)
    assert [row["error"] for row in rows] == [None] * len(rows)
    return rows


def write_lines(path: Path, *rows: Any) -> Path:
    path.write_text(
        "".join(
            (row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)) + "\n" for row in rows
        ),
        encoding="utf-8",
    )
    return path


def frames_folder(
    folder: Path,
    messages: str,
    labels: str | bytes | None,
    names: tuple[str, ...] = ("seq_000001.jpg", "seq_000002.jpg"),
) -> Path:
    for name in names:
        png(folder / "frames" / name)
    (folder / "messages.txt").write_text(messages, encoding="utf-8")
    if labels is not None:
        (folder / "labels.csv").write_bytes(labels if isinstance(labels, bytes) else labels.encode())
    return folder


HELLO = {"instruction": "Say hello", "output": "Hello"}

ASKED = turn("user", "Say hello")

ANSWERED = turn("assistant", "Hello")

COUNT = "USER: How many people?\nASSISTANT: {count} people.\n"
