"""Sample rows with small images, for the reports of the preflight and of a search."""

import base64
import io
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from vlmtune.data.formats import read_fragment
from vlmtune.data.fragment import Fragment
from vlmtune.data.images import ImageError, load_image
from vlmtune.data.objects import Objects
from vlmtune.data.store import Store
from vlmtune.storage import scheme

SAMPLES = 12
IMAGES_PER_SAMPLE = 3
LONGER_SIDE = 320  # pixels of a thumbnail: sharp at half of that on a phone
JPEG_QUALITY = 75
BOX_COLOUR = (230, 30, 30)

Place = tuple[int, int]  # of a row: (number of its fragment, number of the row in the fragment)


@dataclass(frozen=True)
class Sample:
    """One row for people.

    Attributes:
        source: where the row is.
        tokens: number of its tokens.
        turns: (role, text) of each turn.
        images: its first images as data URIs.
        names: file names of all its images, except images that are stored in the data file.
    """

    source: str
    split: str
    tokens: int
    turns: list[tuple[str, str]]
    images: list[str]
    names: tuple[str, ...] = ()


def pick_samples(store: Store, fragments: Sequence[Fragment]) -> list[Sample]:
    """Rows at even distances; only rows with images if there are any, and each set of images once.

    If several rows have the same images, such as dialogues in two languages, each sample takes another of
    them. Each fragment with a sample is read up to its last sample.
    """
    hashes = store.facts().column("image_hashes").to_pylist()
    rows_of = defaultdict[tuple[str, ...], list[int]](list)
    for row, images in enumerate(hashes):
        if images:
            rows_of[tuple(images)].append(row)
    groups = list(rows_of.values()) or [[row] for row in range(store.meta.rows)]
    if not groups:
        return []
    positions = np.unique(np.linspace(0, len(groups) - 1, SAMPLES).astype(int))
    chosen = [groups[position] for position in positions]
    return load_samples(store, fragments, [rows[turn % len(rows)] for turn, rows in enumerate(chosen)])


def load_samples(store: Store, fragments: Sequence[Fragment], rows: Sequence[int]) -> list[Sample]:
    """These rows of the store, in this order."""
    places = [(int(store.column("fragment")[row]), int(store.column("number")[row])) for row in rows]
    raw_rows = dict(_read(fragments, places))
    return [_sample(store, row, raw_rows[place]) for row, place in zip(rows, places, strict=True)]


def _read(fragments: Sequence[Fragment], places: Sequence[Place]) -> Iterator[tuple[Place, dict[str, Any]]]:
    """The raw rows at these places; each fragment is read once."""
    wanted = defaultdict(set)
    for fragment, number in places:
        wanted[fragment].add(number)
    for fragment, numbers in wanted.items():
        for number, row in enumerate(islice(read_fragment(fragments[fragment]), max(numbers) + 1)):
            if number in numbers:
                yield (fragment, number), row


def _sample(store: Store, row: int, raw_row: dict[str, Any]) -> Sample:
    references = raw_row["images"][:IMAGES_PER_SAMPLE]
    return Sample(
        source=raw_row["source"],
        split=str(store.column("split")[row]),
        tokens=int(store.column("tokens")[row]),
        turns=[(message["role"], _text(message["content"])) for message in raw_row["messages"]],
        images=[
            uri
            for number, reference in enumerate(references)
            if (uri := _thumbnail(reference, raw_row["objects"], number)) is not None
        ],
        names=tuple(one.rstrip("/").rpartition("/")[2] for one in raw_row["images"] if isinstance(one, str)),
    )


def _text(content: Sequence[dict[str, Any]]) -> str:
    return " ".join(part["text"] for part in content if part["type"] == "text")


def _boxes_of(objects: Objects | None, image: int) -> list[list[float]]:
    """The boxes and points of one image: in pixels, or in shares of its sides, see `objects["unit"]`."""
    if objects is None:
        return []
    divisor = 1000 if objects["unit"] == "norm1000" else 1
    pairs = zip(objects["boxes"], objects["images"], strict=True)
    return [[number / divisor for number in box] for box, place in pairs if place == image]


def _draw(image: Image.Image, boxes: Sequence[Sequence[float]], *, shares: bool) -> None:
    pen, width = ImageDraw.Draw(image), max(2, max(image.size) // LONGER_SIDE * 2)
    for box in boxes:
        sides = image.size if shares else (1, 1)
        corners = [number * sides[axis % 2] for axis, number in enumerate(box)]
        if len(corners) == 2:
            pen.circle(corners, 3 * width, outline=BOX_COLOUR, width=width)
        else:
            pen.rectangle(corners, outline=BOX_COLOUR, width=width)


def _thumbnail(reference: str | bytes, objects: Objects | None, number: int) -> str | None:
    """A small JPEG as a data URI, with the boxes of the row's image of this number.

    None for an image from the web, and for a file that no longer exists.
    """
    if isinstance(reference, str) and scheme(reference) in ("http", "https"):
        return None
    try:
        image = load_image(reference)
    except ImageError:
        return None
    _draw(image, _boxes_of(objects, number), shares=objects is not None and objects["unit"] != "real")
    image.thumbnail((LONGER_SIDE, LONGER_SIDE))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=JPEG_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
