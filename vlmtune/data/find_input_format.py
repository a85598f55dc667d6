"""Finds the `InputFormat` of a processor by trying it on drawn images.

It is tried on a row with one image, on a row with two images of other shapes, and on both in one batch. A
processor that builds its tensors in an unknown way is refused in one line, before any row is prepared.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import torch
from PIL import Image

from vlmtune.data.collate import collate, split_batch
from vlmtune.data.encoded_example import EncodedExample
from vlmtune.data.input_format import (
    ITEMS,
    ROWS,
    TOKENS,
    Channels,
    InputFormat,
    Normalization,
    TensorLayout,
    image_mask,
    is_ragged,
)
from vlmtune.data.template_rendering import EncodeError
from vlmtune.data.tokenize import Features, RowEncoder
from vlmtune.errors import ModelError

SHAPES = ((90, 60), (50, 130), (75, 70))
TOLERANCE = 1e-5  # for normalized pixels, which range over a few units


def find_input_format(processor: Any) -> InputFormat:
    """Find how this processor's inputs are stored and joined.

    Raises:
        ModelError: the processor takes no conversation with an image, the answers cannot be found again in
            its tokens, or it joins the tensors of rows in an unknown way.
    """
    try:
        nested, rows = _rows(processor)
        encoder = RowEncoder(processor, InputFormat(nested))
        one, two = (encoder.features([row]) for row in rows)
        both = _both(encoder, rows)
        names = sorted(one.tensors.keys() | two.tensors.keys())
        layouts = {name: tensor_layout(name, one, two, both, images=len(rows[1][1])) for name in names}
        floats = InputFormat(nested, layouts)
        found = _with_uint8_pixels(processor, floats, rows, both) or floats
        as_tensors = replace(found, images_as_tensors=True)
        return as_tensors if _makes_the_same(processor, found, as_tensors, rows) else found
    except EncodeError as error:
        raise ModelError(
            f"{type(processor).__name__} takes no conversation with an image: {error}"
        ) from error


def gradient_image(width: int, height: int) -> Image.Image:
    """An image with a gradient in every channel, so that wrong channels, scales and borders show."""
    y, x = np.mgrid[0:height, 0:width]
    channels = [x * 255 // width, y * 255 // height, (x + y) % 256]
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


Row = tuple[list[dict[str, Any]], list[Image.Image]]


def _row(images: int) -> Row:
    """A question about this number of images (1 or 2), and its answer. The shapes differ between rows."""
    words = " and that" * (images - 1)
    question = [{"type": "image"}] * images + [{"type": "text", "text": f"what is this{words}"}]
    messages = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": [{"type": "text", "text": "3 people"}]},
    ]
    return messages, [gradient_image(*shape) for shape in (SHAPES[:1] if images == 1 else SHAPES[1:])]


def _rows(processor: Any) -> tuple[bool, list[Row]]:
    """(whether the processor takes a list of images for each row, the rows to try it on)."""
    refusals = []
    for nested in (True, False):
        encoder = RowEncoder(processor, InputFormat(nested))
        try:
            encoder.encode(*_row(1))
        except EncodeError as error:
            refusals.append(error)
            continue
        try:
            encoder.encode(*_row(2))
        except EncodeError:  # it takes one image a row
            messages, images = _row(1)
            return nested, [(messages, images), (messages, [gradient_image(*SHAPES[1])])]
        return nested, [_row(1), _row(2)]
    raise refusals[0]


def _both(encoder: RowEncoder, rows: list[Row]) -> Features | None:
    """The processor's own batch of both rows; None if it does not take them together."""
    try:
        return encoder.features(rows)
    except EncodeError:
        return None


def _makes_the_same(processor: Any, one: InputFormat, other: InputFormat, rows: list[Row]) -> bool:
    """Whether the processor makes equal tensors in both formats, to the last bit."""
    first, second = RowEncoder(processor, one), RowEncoder(processor, other)
    try:
        return all(same_examples(first.encode(*row), second.encode(*row)) for row in rows)
    except EncodeError:
        return False


def same_examples(one: EncodedExample, other: EncodedExample) -> bool:
    """Whether two examples are equal to the last bit."""
    return (
        np.array_equal(one.input_ids, other.input_ids)
        and np.array_equal(one.kinds, other.kinds)
        and one.tensors.keys() == other.tensors.keys()
        and all(
            value.dtype == other.tensors[name].dtype and np.array_equal(value, other.tensors[name])
            for name, value in one.tensors.items()
        )
    )


def tensor_layout(
    name: str, one: Features, two: Features, both: Features | None, *, images: int
) -> TensorLayout:
    first, second = one.tensors.get(name), two.tensors.get(name)
    if is_ragged(first) or is_ragged(second):
        return TensorLayout(ITEMS, 1, ragged=True)
    if first is None or second is None or first.ndim != second.ndim or not first.ndim:
        raise EncodeError(f"its {name} is not the same kind of tensor in rows with one and with two images")
    for axis in range(1, first.ndim):
        if (first.shape[axis], second.shape[axis]) == (one.ids.shape[1], two.ids.shape[1]):
            return TensorLayout(TOKENS, axis)
    together = None if both is None else both.tensors.get(name)
    joined = together.shape if isinstance(together, torch.Tensor) else None
    one_each = first.shape[0] == second.shape[0] == 1
    if one_each and images > 1 and (joined is None or joined[0] == 2):
        return TensorLayout(ROWS)
    for axis in range(first.ndim):
        if joined is None or joined[axis] == first.shape[axis] + second.shape[axis]:
            return TensorLayout(ITEMS, axis)
    raise EncodeError(
        f"its {name} {tuple(first.shape)} and {tuple(second.shape)} of two rows make a batch of "
        f"{tuple(joined or ())}, which is no way of joining rows that is known"
    )


def _with_uint8_pixels(
    processor: Any, floats: InputFormat, rows: list[Row], both: Features | None
) -> InputFormat | None:
    """The format that stores resized uint8 pixels, if normalizing these gives the processor's own floats."""
    encoder = RowEncoder(processor, floats)
    normalized = [encoder.features([row]) for row in rows]
    try:
        raw = [encoder.features([row], skip_normalization=True) for row in rows]
    except EncodeError:
        return None
    found: dict[str, Normalization] = {}
    for name, layout in floats.layouts.items():
        pairs = [(one.tensors[name], other.tensors[name]) for one, other in zip(normalized, raw, strict=True)]
        if layout.kind == TOKENS or all(same_tensors(one, other) for one, other in pairs):
            continue
        if layout.ragged:
            return None
        masks = [image_mask(one.tensors, one.tensors[name]) for one in raw]
        candidates = normalization_candidates(processor.image_processor)
        fitting = (
            candidate
            for candidate in candidates
            if all(gives_own_pixels(candidate, *pair, mask) for pair, mask in zip(pairs, masks, strict=True))
        )
        normalization = next(fitting, None)
        if normalization is None:
            return None
        found[name] = normalization
    stored = replace(floats, normalizations=found)
    return stored if found and _joins_as(processor, stored, rows, both) else None


def normalization_candidates(image_processor: Any) -> Iterator[Normalization]:
    scale = getattr(image_processor, "rescale_factor", None)
    scales = [float(scale) if scale is not None and getattr(image_processor, "do_rescale", False) else 1.0]
    names = [name.removesuffix("mean") for name in vars(image_processor) if name.endswith("image_mean")]
    means = [
        (
            _three(getattr(image_processor, f"{name}mean")),
            _three(getattr(image_processor, f"{name}std", None)),
        )
        for name in names
    ]
    for channels in get_args(Channels):
        for one in scales:
            for mean, std in [*means, ((0.0,) * 3, (1.0,) * 3)]:
                if mean is not None and std is not None:
                    yield Normalization(one, mean, std, channels)


def _three(values: Any) -> tuple[float, ...] | None:
    """`values` as one value for each of three channels; None if that is not possible."""
    if values is None:
        return None
    if isinstance(values, int | float):
        return (float(values),) * 3
    return tuple(float(value) for value in values) if len(values) == 3 else None


def gives_own_pixels(
    normalization: Normalization, normalized: torch.Tensor, raw: torch.Tensor, mask: torch.Tensor | float
) -> bool:
    """Whether normalizing raw pixels gives the processor's own normalized pixels."""
    if not normalization.fits(raw) or not _whole(raw):
        return False
    return torch.allclose(normalization(raw.to(torch.uint8)) * mask, normalized.float(), atol=TOLERANCE)


def _whole(raw: torch.Tensor) -> bool:
    """Whether all pixels are whole numbers from 0 to 255."""
    return bool((raw.to(torch.uint8).to(raw.dtype) == raw).all())


def same_tensors(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.shape == other.shape and torch.equal(one, other)
    return False


def _joins_as(processor: Any, stored: InputFormat, rows: list[Row], both: Features | None) -> bool:
    """Whether rows that were encoded one by one make the processor's own batch."""
    if both is None:
        return True
    encoder = RowEncoder(processor, stored)
    examples: list[EncodedExample] = [encoder.encode(*row) for row in rows]
    arrays = collate(examples, pad_token_id=0, input_format=stored)
    batch = next(split_batch({name: torch.from_numpy(array) for name, array in arrays.items()}, len(rows)))
    ours = stored.normalize(batch)
    return all(
        ours[name].shape == both.tensors[name].shape
        and torch.allclose(ours[name].double(), both.tensors[name].double(), atol=TOLERANCE)
        for name in stored.normalizations
    )
