"""Finds how a processor handles videos by trying it on drawn frames."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from vlmtune.data.collate import collate, split_batch
from vlmtune.data.find_input_format import (
    TOLERANCE,
    gives_own_pixels,
    gradient_image,
    normalization_candidates,
    same_tensors,
    tensor_layout,
)
from vlmtune.data.input_format import (
    FLOAT_VIDEOS,
    TOKENS,
    UINT8_VIDEOS,
    InputFormat,
    Normalization,
    image_mask,
)
from vlmtune.data.template_rendering import EncodeError
from vlmtune.data.tokenize import Features, Row, RowEncoder
from vlmtune.data.video_frames import Video

SIZES = ((90, 60), (64, 130), (75, 70))
RATE = 10.0  # frames a second of the drawn videos


def find_video_format(processor: Any, found: InputFormat) -> InputFormat:
    """Add how the processor handles videos to the format; unchanged if the processor takes no videos.

    The processor is tried on a row with one video, on a row with two videos of other sizes, and on both in
    one batch. Rows that were encoded one by one have to give the processor's own batch.

    Args:
        found: the format for images, from `find_input_format`.
    """
    try:
        floats = _with_layouts(processor, found)
        return _with_raw_pixels(processor, floats) or _checked(processor, floats)
    except (EncodeError, ValueError):
        return found


def _rows() -> list[Row]:
    return [_row(_video(SIZES[0])), _row(_video(SIZES[1]), _video(SIZES[2]))]


def _row(*videos: Video) -> Row:
    question = [*({"type": "video"} for _ in videos), {"type": "text", "text": "what happens here"}]
    messages = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": [{"type": "text", "text": "3 people walk"}]},
    ]
    return messages, [], videos


def _video(size: tuple[int, int], frames: int = 4) -> Video:
    still = np.asarray(gradient_image(*size))
    moving = np.stack([np.roll(still, 7 * number, axis=1) for number in range(frames)])
    return Video(moving, tuple(range(0, 5 * frames, 5)), 5 * frames, RATE)


def _with_layouts(processor: Any, found: InputFormat) -> InputFormat:
    encoder = RowEncoder(processor, replace(found, normalizations={}, videos=FLOAT_VIDEOS))
    rows = _rows()
    one, two = (encoder.features([row]) for row in rows)
    both = encoder.features(rows)
    names = sorted(one.tensors.keys() | two.tensors.keys())
    layouts = {name: tensor_layout(name, one, two, both, images=2) for name in names}
    if any(found.layouts.get(name, layout) != layout for name, layout in layouts.items()):
        raise EncodeError("its videos are joined in another way than its images")
    own_token = encoder.tokenizer.convert_tokens_to_ids(encoder.template.renderer.video_token)
    if layouts.keys() - found.layouts.keys() and own_token not in one.ids:
        # GLM-V's class, for example, then cannot tell images and videos of a batch apart.
        raise EncodeError("its videos have the tokens of images")
    return replace(found, layouts={**found.layouts, **layouts}, videos=FLOAT_VIDEOS)


def _with_raw_pixels(processor: Any, floats: InputFormat) -> InputFormat | None:
    """The format that stores resized uint8 pixels of videos, if normalizing gives the own floats."""
    if not floats.stores_uint8_pixels:
        return None
    raw_format = replace(floats, videos=UINT8_VIDEOS)
    own = [RowEncoder(processor, floats).features([row]) for row in _rows()]
    try:
        raw = [RowEncoder(processor, raw_format).features([row], skip_normalization=True) for row in _rows()]
    except EncodeError:  # its class takes normalized pixels only
        return None
    more = {
        name: _normalization(processor, floats, name, own, raw)
        for name, layout in floats.layouts.items()
        if layout.kind != TOKENS
        and name in own[0].tensors
        and not all(same_tensors(a.tensors[name], b.tensors[name]) for a, b in zip(own, raw, strict=True))
    }
    if not more or any(normalization is None for normalization in more.values()):
        return None
    known = {name: one for name, one in more.items() if one is not None}
    return _checked(
        processor, replace(floats, normalizations={**floats.normalizations, **known}, videos=UINT8_VIDEOS)
    )


def _normalization(
    processor: Any, floats: InputFormat, name: str, own: Sequence[Features], raw: Sequence[Features]
) -> Normalization | None:
    pairs = [(a.tensors[name], b.tensors[name]) for a, b in zip(own, raw, strict=True)]
    if not all(isinstance(tensor, torch.Tensor) for pair in pairs for tensor in pair):
        return None
    masks = [image_mask(one.tensors, one.tensors[name]) for one in raw]
    of_images = floats.normalizations.get(name)  # the same tensor holds images and videos
    candidates = normalization_candidates(processor.video_processor) if of_images is None else [of_images]
    return next(
        (
            one
            for one in candidates
            if all(gives_own_pixels(one, *pair, mask) for pair, mask in zip(pairs, masks, strict=True))
        ),
        None,
    )


def _checked(processor: Any, stored: InputFormat) -> InputFormat:
    """The format, if rows that are encoded one by one make the processor's own batch.

    Raises:
        EncodeError: they do not.
    """
    rows = _rows()
    own = RowEncoder(processor, replace(stored, normalizations={})).features(rows)
    encoder = RowEncoder(processor, stored)
    arrays = collate([encoder.encode(*row) for row in rows], pad_token_id=0, input_format=stored)
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    ours = stored.normalize(next(split_batch(tensors, len(rows))))
    for name, layout in stored.layouts.items():
        theirs = own.tensors.get(name)
        if layout.kind == TOKENS or theirs is None:
            continue
        if ours[name].shape != theirs.shape or not torch.allclose(
            ours[name].double(), theirs.double(), atol=TOLERANCE
        ):
            raise EncodeError(f"its {name} of two rows are joined in a way that is not known")
    return stored
