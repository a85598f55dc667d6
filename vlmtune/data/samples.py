"""Sample rows with small images, for the reports of the preflight and of a search."""

import base64
import io
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

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

RowsByLanguage = Mapping[str, Mapping[Any, list[int]]]  # rows by images, by language
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
    """Rows of each language in turn, at even distances; only rows with images if there are any.

    Each set of images is sampled once. If a language has several rows about the same images, each of its
    samples takes another of them. Each fragment with a sample is read up to its last sample.
    """
    facts = store.facts()
    hashes, languages = facts.column("image_hashes").to_pylist(), facts.column("language").to_pylist()
    rows_with_images = [row for row, images in enumerate(hashes) if images]
    by_language: defaultdict[str, defaultdict[tuple[str, ...], list[int]]]
    by_language = defaultdict(lambda: defaultdict(list))
    for row in rows_with_images or range(store.meta.rows):
        by_language[languages[row]][tuple(hashes[row]) or (str(row),)].append(row)
    return load_samples(store, fragments, sample_rows(by_language))


def sample_rows(by_language: RowsByLanguage) -> list[int]:
    """At most SAMPLES rows, in the order of their images in the data; see `pick_samples`.

    Languages with few images choose first, so that they find images that no other sample has. A language
    whose images are all taken gets one row all the same.

    Args:
        by_language: the rows of each set of images, of each language.
    """
    first_rows: dict[Any, int] = {}  # of each set of images
    for images in by_language.values():
        for image, rows in images.items():
            first_rows[image] = min(rows[0], first_rows.get(image, rows[0]))
    number = min(SAMPLES, max(len(first_rows), len(by_language)))
    slots = _slots({language: len(images) for language, images in by_language.items()}, number)
    chosen: list[tuple[int, int]] = []  # (first row of its images, row)
    sampled: set[Any] = set()
    for language in sorted(slots, key=lambda language: len(by_language[language])):
        own = list(by_language[language])
        for turn, slot in enumerate(slots[language]):
            wanted = round(slot / max(number - 1, 1) * (len(own) - 1))
            image = next((one for one in _nearest(own, wanted) if one not in sampled), None)
            if image is None and turn:
                break
            image = image or own[wanted]
            sampled.add(image)
            rows = by_language[language][image]
            chosen.append((first_rows[image], rows[turn % len(rows)]))
    return [row for _, row in sorted(chosen)]


def _nearest(images: Sequence[Any], place: int) -> Iterator[Any]:
    """The images in the order of their distance from a place."""
    for distance in range(len(images)):
        for other in (place - distance, place + distance):
            if 0 <= other < len(images):
                yield images[other]


def _slots(images: Mapping[str, int], number: int) -> dict[str, list[int]]:
    """The numbers, from 0 to `number`, of the samples of each language: in turn, as long as it has images."""
    slots: dict[str, list[int]] = {language: [] for language in images}
    slot = 0
    while slot < number:
        before = slot
        for language in images:
            if slot < number and len(slots[language]) < images[language]:
                slots[language].append(slot)
                slot += 1
        if slot == before:
            break
    return slots


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
