"""Encodes raw rows: to a line of the store's index, and to an `EncodedExample`."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image

from vlmtune.data.encoded_example import EncodedExample, required_length
from vlmtune.data.facts import error_kind, row_facts, shortened
from vlmtune.data.images import SCALED, ImageError, RowPixels, content_hash
from vlmtune.data.input_format import InputFormat
from vlmtune.data.near_duplicates import perceptual_hash
from vlmtune.data.split import GROUP
from vlmtune.data.store import Store
from vlmtune.data.tokenize import EncodeError, RowEncoder
from vlmtune.data.video_frames import Video, load_video
from vlmtune.errors import DataError
from vlmtune.model_ref import ModelRef

DEEP_IMAGES = "images of more than 8 bits are scaled, each from its darkest to its brightest value"
MAX_CHARACTERS = 4_000_000  # of a row: about a million tokens, more than any model's context


def cached_encoder(
    model: ModelRef, input_format: InputFormat, key: str, box_format: str, video_frames: int | None
) -> RowEncoder:
    """The row encoder, which each process keeps: loading a processor takes a second.

    Args:
        key: the store's key. It changes with the processor's files, so that a changed processor is loaded.
        box_format: how the model writes box_format, see `box_formats.box_format_name`.
    """
    return _encoder(model, json.dumps(input_format.to_dict(), sort_keys=True), key, box_format, video_frames)


@lru_cache(maxsize=2)
def _encoder(
    model: ModelRef, input_format: str, key: str, box_format: str, video_frames: int | None
) -> RowEncoder:
    return RowEncoder(
        model.processor(), InputFormat.from_dict(json.loads(input_format)), box_format, video_frames
    )


def read_examples(store: Store, rows: Sequence[int]) -> list[EncodedExample]:
    """The examples of these rows of a store. A store of raw rows (`--no_cache`) encodes them now.

    Raises:
        DataError: a row, or an image of it, can no longer be read.
    """
    if store.meta.encoded:
        return store.read(rows)
    if store.model is None:
        raise ValueError("a store of rows as they were read needs the model whose processor encodes them")
    meta = store.meta
    encoder = cached_encoder(store.model, meta.input_format, meta.key, meta.box_format, meta.video_frames)
    examples = []
    for record in store.records(rows):
        line, example = encode_row(encoder, record)
        if example is None:
            raise DataError(f"{line['source']}: {line['error']} (it could be read when the run began)")
        examples.append(example)
    return examples


def encode_row(encoder: RowEncoder, row: dict[str, Any]) -> tuple[dict[str, Any], EncodedExample | None]:
    """(index line, example) of a row from `read_fragment`; a bad row has no example.

    The line of a bad row has the reason in `error`, and the reason without numbers and paths in `error_kind`.
    """
    paths = [reference for reference in (*row["images"], *row["videos"]) if isinstance(reference, str)]
    line: dict[str, Any] = {
        "source": row["source"],
        "images": paths,
        "error": None,
        "shard": None,
        "row_group": 0,
        "offset": 0,
        "given_split": row["split"],
        "found_by_name": row["found_by_name"],
    }
    if row["error"] is not None:
        return {
            **line,
            "error": shortened(row["error"]),
            "error_kind": row["error_kind"] or error_kind(row["error"]),
        }, None
    try:
        check_texts(row["messages"])
        images = load_images(row["images"], row["hints"])
        messages = row["messages"]
        if row["objects"] is not None:
            messages = encoder.boxes.write(messages, row["objects"], images)
        videos = load_videos(row["videos"], row["hints"], encoder.video_frames)
        # Copied out of Pillow once, for the processor and for both hashes.
        pixels = [np.asarray(image) for image in images]
        example = encoder.encode(messages, images, videos, pixels)
    except ImageError as error:
        return {**line, "error": shortened(str(error)), "error_kind": error_kind(str(error))}, None
    except EncodeError as error:
        return {**line, "error": shortened(str(error)), "error_kind": error_kind(str(error))}, None
    image_hashes = [content_hash(array) for array in pixels]
    video_hashes = [video.content_hash for video in videos]
    group = [f"{GROUP}{row['group']}"] if row["group"] is not None else []
    notes = (DEEP_IMAGES,) if any(SCALED in image.info for image in images) else ()
    line |= {
        "unused": list(row["unused"]),
        "reading_notes": [*row["reading_notes"], *notes],
        "perceptual_hashes": [perceptual_hash(array) for array in pixels],
        "group_keys": (image_hashes + video_hashes or [_question_hash(messages)]) + group,
        "videos": len(videos),
        "tokens": len(example.input_ids),
        "image_tokens": example.image_tokens,
        "answer_tokens": int((example.labels >= 0).sum()),
        "required": required_length(example),
        **row_facts(messages, images, image_hashes, video_hashes),
    }
    return line, example


def load_images(references: Sequence[str | bytes], hints: Mapping[str, str]) -> list[Image.Image]:
    """The images of a row: paths, URIs or encoded bytes.

    Args:
        hints: what to do if there is no such file, by path.

    Raises:
        ImageError: an image cannot be used. The message names its path, and what to do if it is not there.
    """
    images = []
    pixels = RowPixels()
    for reference in references:
        try:
            images.append(pixels.load(reference))
        except ImageError as error:
            if isinstance(reference, bytes):
                raise ImageError(f"image: {error}") from error
            hint = hints.get(reference)
            raise ImageError(f"image {reference}: {error}" + (f" ({hint})" if hint else "")) from error
    return images


def load_videos(paths: Sequence[str], hints: Mapping[str, str], frames: int | None) -> list[Video]:
    """The videos of a row.

    Args:
        frames: number of frames that are taken of each video.

    Raises:
        ImageError: `frames` is None, or a video cannot be used. The message names its path.
    """
    videos = []
    for path in paths:
        if frames is None:
            raise ImageError(
                "the row has a video, and videos are not read unless you say how many frames of each: "
                "--video_frames 8; or save its frames as images"
            )
        try:
            videos.append(load_video(path, frames))
        except ImageError as error:
            hint = hints.get(path)
            raise ImageError(f"video {path}: {error}" + (f" ({hint})" if hint else "")) from error
    return videos


def check_texts(messages: list[dict[str, Any]]) -> None:
    """Raises EncodeError for texts that would take minutes and gigabytes to tokenize."""
    letters = sum(
        len(part.get("text") or "") for message in messages for part in message["content"] if "text" in part
    )
    if letters > MAX_CHARACTERS:
        raise EncodeError(f"the row's texts have {letters:,} characters, and {MAX_CHARACTERS:,} are allowed")


def _question_hash(messages: list[dict[str, Any]]) -> str:
    """16 hex digits of the user's texts. Rows without images are grouped by it when they are split."""
    questions = [
        part["text"]
        for message in messages
        if message["role"] == "user"
        for part in message["content"]
        if part["type"] == "text"
    ]
    return hashlib.blake2b(" ".join(" ".join(questions).split()).encode(), digest_size=8).hexdigest()
