"""What is to be answered: a folder of images with one question, or rows in any data format, with or without
their answers."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from pyarrow import fs

from vlmtune.data.formats import READERS, Piece
from vlmtune.data.image_paths import RowError
from vlmtune.data.images import ImageError, load_image
from vlmtune.data.records import conversation
from vlmtune.data.scan import scan
from vlmtune.data.tokenize import EncodeError, RowEncoder
from vlmtune.errors import ConfigError, DataError
from vlmtune.model_ref import ModelRef
from vlmtune.storage import absolute, filesystem, scheme

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".avif")
IMAGES_PER_PIECE = 64
# stands for an answer that is not there: a conversation ends with one; it is never shown to the model
ANSWER = "?"


@dataclass(frozen=True)
class ImageList:
    """Some images of a folder, absolute paths or URIs, all with the same question; what `Piece` is for data
    files."""

    paths: tuple[str, ...]
    question: str


@dataclass(frozen=True)
class Asked:
    """One row to be answered: its place in its piece, where people find it, and why it cannot be answered,
    if so."""

    piece: int
    number: int
    source: str
    images: list[str | None]
    has_reference: bool
    error: str | None


def pieces_of(data_path: str, question: str | None, **rules: Any) -> Sequence[Piece | ImageList]:
    """The pieces of what is to be answered, in its order. `rules` are those of `scan.scan`.

    Raises:
        ConfigError: images without a question.
        DataError: there is nothing to answer, or nothing that is understood.
    """
    if question is not None:
        paths = image_paths(data_path)
        if not paths:
            raise DataError(
                f"--data_path {data_path}: there is no image ({', '.join(SUFFIXES[:4])} …), so there is nothing to ask about"
            )
        return [
            ImageList(tuple(paths[at : at + IMAGES_PER_PIECE]), question)
            for at in range(0, len(paths), IMAGES_PER_PIECE)
        ]
    try:
        return scan(data_path, **rules)
    except DataError:
        if image_paths(data_path):
            raise ConfigError(f"--question is missing: {data_path} holds images and no questions") from None
        raise


def image_paths(data_path: str) -> list[str]:
    """The images in a folder and the folders in it, by name, or the one image that the path names."""
    try:
        system, inner = filesystem(absolute(data_path))
        info = system.get_file_info(inner)
        found = (
            system.get_file_info(fs.FileSelector(inner, recursive=True))
            if info.type == fs.FileType.Directory
            else [info]
        )
    except (OSError, ValueError, NotImplementedError) as error:
        raise DataError(f"--data_path {data_path}: cannot be read: {error}") from error
    prefix = data_path.removesuffix(inner) if scheme(data_path) not in ("", "file") else ""
    images = (
        entry for entry in found if entry.type == fs.FileType.File and entry.path.lower().endswith(SUFFIXES)
    )
    return sorted(prefix + entry.path for entry in images)


def read(
    piece: Piece | ImageList,
    index: int,
    after: int,
    model: ModelRef,
    raw_pixels: bool,
) -> Iterator[dict[str, bytes]]:
    """{"row": an `Asked`, "example": its `EncodedExample` or None}, pickled, for the rows of a piece from number
    `after` on."""
    encoder = _encoder(model, raw_pixels)
    for number, (source, record, error) in enumerate(_records(piece)):
        if number < after:
            continue
        images: list[str | bytes] = []
        example, whole = None, record if isinstance(piece, ImageList) else complete(record)
        try:
            if error is not None:
                raise RowError(error)
            messages, images = whole if isinstance(piece, ImageList) else conversation(whole, piece.rules)
            example = encoder.encode(messages, [load_image(image) for image in images])
        except (RowError, ImageError, EncodeError) as reason:
            error = str(reason)
        names = [image if isinstance(image, str) else None for image in images]
        asked = Asked(
            index, number, source, names, whole is record and not isinstance(piece, ImageList), error
        )
        yield {"row": pickle.dumps(asked), "example": pickle.dumps(example)}


def _records(piece: Piece | ImageList) -> Iterator[tuple[str, Any, str | None]]:
    """(source, record, error) of each row; the record of an image is its conversation."""
    if isinstance(piece, Piece):
        yield from ((found.source, found.record, found.error) for found in READERS[piece.format](piece))
        return
    question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": piece.question}]}
    answer = {"role": "assistant", "content": [{"type": "text", "text": ANSWER}]}
    yield from ((path, ([question, answer], [path]), None) for path in piece.paths)


def complete(record: Any) -> Any:
    """The record with `ANSWER` as its last answer, if it has none; the same object if it has one, or is in
    no known form."""
    if not isinstance(record, Mapping):
        return record
    for field, turn in (
        ("messages", {"role": "assistant", "content": ANSWER}),
        ("conversations", {"from": "gpt", "value": ANSWER}),
    ):
        turns = record.get(field)
        if isinstance(turns, list) and turns and isinstance(turns[-1], Mapping):
            return (
                {**record, field: [*turns, turn]}
                if turns[-1].get("role", turns[-1].get("from")) in ("user", "human")
                else record
            )
    if record.get("prompt") is not None and not record.get("completion"):
        return {**record, "completion": [{"role": "assistant", "content": ANSWER}]}
    if record.get("instruction") is not None and not record.get("output"):
        return {**record, "output": ANSWER}
    return record


@lru_cache(maxsize=1)
def _encoder(model: ModelRef, raw_pixels: bool) -> RowEncoder:
    """One a worker process: loading a processor costs a second."""
    return RowEncoder(model.processor(), raw_pixels=raw_pixels)
