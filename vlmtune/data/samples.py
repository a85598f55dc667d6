"""A few rows of the data as a person sees them, with small pictures, for the preflight's page and a search's
report."""

import base64
import io
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from vlmtune.data.formats import Piece, read_piece
from vlmtune.data.images import ImageError, load_image
from vlmtune.data.store import Store
from vlmtune.storage import scheme

SAMPLES = 12
IMAGES = 3  # of one row
SIDE = 320  # pixels of a picture's longer side: sharp at half of that on a phone
QUALITY = 75


@dataclass(frozen=True)
class Sample:
    """One row: its place, split and tokens, its turns as (role, text), and pictures as data URIs."""

    source: str
    split: str
    tokens: int
    turns: list[tuple[str, str]]
    pictures: list[str]


def samples(store: Store, pieces: Sequence[Piece]) -> list[Sample]:
    """Rows at even distances, those with images if there are any. Reads the pieces that hold them up to the
    last one."""
    facts = store.facts()
    hashes = facts.column("image_hashes").to_pylist()
    first_of = {
        tuple(images): row for row, images in reversed(list(enumerate(hashes))) if images
    }  # each picture once
    rows = sorted(first_of.values()) or list(range(store.meta.rows))
    chosen = (
        [rows[place] for place in np.unique(np.linspace(0, len(rows) - 1, SAMPLES).astype(int))]
        if rows
        else []
    )
    return samples_of(store, pieces, chosen)


def samples_of(store: Store, pieces: Sequence[Piece], chosen: Sequence[int]) -> list[Sample]:
    """These rows of the store, in this order."""
    places = [(int(store.column("piece")[row]), int(store.column("number")[row])) for row in chosen]
    found = dict(_read(pieces, places))
    return [_sample(store, row, found[place]) for row, place in zip(chosen, places, strict=True)]


def _read(
    pieces: Sequence[Piece], places: Sequence[tuple[int, int]]
) -> Iterator[tuple[tuple[int, int], dict[str, Any]]]:
    """The rows at these (piece, number), each piece read once."""
    wanted = defaultdict(set)
    for piece, number in places:
        wanted[piece].add(number)
    for piece, numbers in wanted.items():
        for number, row in enumerate(islice(read_piece(pieces[piece]), max(numbers) + 1)):
            if number in numbers:
                yield (piece, number), row


def _sample(store: Store, row: int, found: dict[str, Any]) -> Sample:
    turns = [(message["role"], _text(message["content"])) for message in found["messages"]]
    pictures = [
        picture for reference in found["images"][:IMAGES] if (picture := _picture(reference)) is not None
    ]
    return Sample(
        found["source"], str(store.column("split")[row]), int(store.column("tokens")[row]), turns, pictures
    )


def _text(content: Sequence[dict[str, Any]]) -> str:
    return " ".join(part["text"] for part in content if part["type"] == "text")


def _picture(reference: str | bytes) -> str | None:
    """A small JPEG as a data URI; None for one that would have to be downloaded again, or that has just
    gone."""
    if isinstance(reference, str) and scheme(reference) in ("http", "https"):
        return None
    try:
        image = load_image(reference)
    except ImageError:
        return None
    image.thumbnail((SIDE, SIDE))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
