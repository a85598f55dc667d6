"""The rows that predict.py answers: images with one question, or rows of any data format.

Rows may or may not have a reference answer.
"""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from pyarrow import fs

from vlmtune.data.examples import load_images, load_videos
from vlmtune.data.facts import shortened
from vlmtune.data.formats import READERS
from vlmtune.data.fragment import Fragment
from vlmtune.data.image_paths import RowError
from vlmtune.data.images import ImageError
from vlmtune.data.input_format import InputFormat
from vlmtune.data.names import IMAGE_SUFFIXES, is_system_file
from vlmtune.data.records import conversation
from vlmtune.data.row_shapes import QUESTION_FIELDS, as_known_shape
from vlmtune.data.scan import scan
from vlmtune.data.tokenize import EncodeError, RowEncoder
from vlmtune.errors import ConfigError, DataError
from vlmtune.model_ref import ModelRef
from vlmtune.storage import absolute, filesystem, scheme

IMAGES_PER_FRAGMENT = 64
# Takes the place of a missing answer, because a conversation has to end with one. The model never sees it.
PLACEHOLDER_ANSWER = "?"


@dataclass(frozen=True)
class ImageList:
    """Some images of a folder with the same question; the counterpart of `Fragment` for data files.

    `paths` are absolute paths or URIs.
    """

    paths: tuple[str, ...]
    question: str


@dataclass(frozen=True)
class QuestionRow:
    """One row to be answered.

    Attributes:
        fragment: index of the fragment that the row is in.
        number: index of the row in its fragment.
        source: where a person finds the row, such as `data.jsonl:3`.
        images: path or URL of each image; None for an image that is stored in the data file.
        has_reference: whether the row has an answer of its own.
        error: why the row cannot be answered; None if it can.
    """

    fragment: int
    number: int
    source: str
    images: list[str | None]
    has_reference: bool
    error: str | None


def question_fragments(data_path: str, question: str | None, **rules: Any) -> Sequence[Fragment | ImageList]:
    """List the fragments of `data_path` in order.

    Args:
        question: the question about every image; None if the rows have questions of their own.
        rules: options of `scan.scan`.

    Raises:
        ConfigError: there are images but no question.
        DataError: there is nothing to answer, or the format is unknown.
    """
    if question is not None:
        paths = image_paths(data_path)
        if not paths:
            raise DataError(
                f"--data_path {data_path}: there is no image (.jpg, .png, .webp …), so there is "
                "nothing to ask about"
            )
        return [
            ImageList(tuple(paths[at : at + IMAGES_PER_FRAGMENT]), question)
            for at in range(0, len(paths), IMAGES_PER_FRAGMENT)
        ]
    try:
        return scan(data_path, **rules)
    except DataError:
        if image_paths(data_path):
            raise ConfigError(f"--question is missing: {data_path} holds images and no questions") from None
        raise


def image_paths(data_path: str) -> list[str]:
    """The images in a folder and its subfolders, sorted by name; or the one image that the path names."""
    try:
        system, inner = filesystem(absolute(data_path))
        info = system.get_file_info(inner)
        if info.type == fs.FileType.Directory and scheme(data_path) in ("", "file"):
            return _local_images(inner)
        entries = (
            system.get_file_info(fs.FileSelector(inner, recursive=True))
            if info.type == fs.FileType.Directory
            else [info]
        )
    except (OSError, ValueError, NotImplementedError) as error:
        raise DataError(f"--data_path {data_path}: cannot be read: {error}") from error
    prefix = data_path.removesuffix(inner) if scheme(data_path) not in ("", "file") else ""
    images = (
        entry
        for entry in entries
        if entry.type == fs.FileType.File
        and entry.path.lower().endswith(IMAGE_SUFFIXES)
        and not is_system_file(entry.base_name)
    )
    return sorted(prefix + entry.path for entry in images)


def _local_images(folder: str) -> list[str]:
    """The images below a local folder. Links to folders are followed, but no folder is read twice."""
    images = []
    seen = {os.path.realpath(folder)}
    for place, folders, names in os.walk(folder, followlinks=True):
        images += [
            f"{place}/{name}"
            for name in names
            if name.lower().endswith(IMAGE_SUFFIXES) and not is_system_file(name)
        ]
        new = {os.path.realpath(f"{place}/{name}"): name for name in sorted(folders, reverse=True)}
        folders[:] = [name for real, name in new.items() if real not in seen]
        seen.update(new)
    return sorted(path for path in images if Path(path).is_file())


def read_questions(
    fragment: Fragment | ImageList,
    index: int,
    first: int,
    model: ModelRef,
    input_format: InputFormat,
    box_format: str = "unknown",
    video_frames: int | None = None,
) -> Iterator[dict[str, bytes]]:
    """Read the rows of a fragment from number `first` on.

    Args:
        box_format: how the model writes boxes, see `box_formats.box_format_name`.
        video_frames: number of frames that are read of a video.

    Yields:
        {"row": a `QuestionRow`, "example": its `EncodedExample`, or None if it cannot be answered}, both as
        pickled bytes.
    """
    encoder = _question_encoder(
        model, json.dumps(input_format.to_dict(), sort_keys=True), box_format, video_frames
    )
    for number, (source, record, error) in enumerate(_records(fragment)):
        if number < first:
            continue
        images: list[str | bytes] = []
        example = None
        completed = record
        try:
            if error is not None:
                raise RowError(error)
            if isinstance(fragment, ImageList):
                messages, images = completed
                hints: dict[str, str] = {}
                objects = None
                video_paths: tuple[str, ...] = ()
            else:
                record = as_known_shape(fragment.columns.apply(record))[0]
                completed = with_answer(record)
                found = conversation(completed, fragment.rules, has_answer=completed is record)
                messages, images, hints = found.messages, found.images, found.hints
                objects, video_paths = found.objects, found.videos
            pixels = load_images(images, hints)
            if objects is not None:
                messages = encoder.boxes.write(messages, objects, pixels)
            videos = load_videos(video_paths, hints, encoder.video_frames)
            example = encoder.encode(messages, pixels, videos)
        except (RowError, ImageError, EncodeError) as reason:
            error = shortened(str(reason))
        names = [image if isinstance(image, str) else None for image in images]
        has_reference = completed is record and not isinstance(fragment, ImageList)
        row = QuestionRow(index, number, source, names, has_reference, error)
        yield {"row": pickle.dumps(row), "example": pickle.dumps(example)}


def _records(fragment: Fragment | ImageList) -> Iterator[tuple[str, Any, str | None]]:
    """(source, record, error) of each row; the record of an image is already a conversation."""
    if isinstance(fragment, Fragment):
        yield from ((row.source, row.record, row.error) for row in READERS[fragment.format](fragment))
        return
    question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": fragment.question}]}
    answer = {"role": "assistant", "content": [{"type": "text", "text": PLACEHOLDER_ANSWER}]}
    yield from ((path, ([question, answer], [path]), None) for path in fragment.paths)


def with_answer(record: Any) -> Any:
    """Add PLACEHOLDER_ANSWER to a record without an answer.

    Returns the same object if the record has an answer, or if its format is unknown.
    """
    if not isinstance(record, Mapping):
        return record
    for field, turn in (
        ("messages", {"role": "assistant", "content": PLACEHOLDER_ANSWER}),
        ("conversations", {"from": "gpt", "value": PLACEHOLDER_ANSWER}),
    ):
        turns = record.get(field)
        if isinstance(turns, list) and turns and isinstance(turns[-1], Mapping):
            return (
                {**record, field: [*turns, turn]}
                if turns[-1].get("role", turns[-1].get("from")) in ("user", "human")
                else record
            )
    if record.get("prompt") is not None and not record.get("completion"):
        return {**record, "completion": [{"role": "assistant", "content": PLACEHOLDER_ANSWER}]}
    for question, answer in QUESTION_FIELDS:
        if isinstance(record.get(question), str) and not record.get(answer):
            rest = {name: value for name, value in record.items() if name not in (question, answer)}
            return {**rest, "instruction": record[question], "output": PLACEHOLDER_ANSWER}
    if record.get("instruction") is not None and not record.get("output"):
        return {**record, "output": PLACEHOLDER_ANSWER}
    return record


@lru_cache(maxsize=1)
def _question_encoder(
    model: ModelRef, input_format: str, box_format: str, video_frames: int | None
) -> RowEncoder:
    """The encoder of a worker process, which is kept because loading a processor takes a second."""
    return RowEncoder(
        model.processor(), InputFormat.from_dict(json.loads(input_format)), box_format, video_frames
    )
