"""Examples → one padded batch, and the normalisation of its pixels on the device.

A processor called on a whole batch pads ids, tiles and masks in its own way. `collate` gives the same
tensors from rows that were
processed one by one, so that rows can be prepared once and mixed in any batch.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from vlmtune.data.tokenize import IGNORED, SEQUENCE_TENSORS, EncodedExample, RowEncoder

# Before the name of a tensor whose first dimension is not the row: how much of it belongs to each row, shape
# `[B]`.
COUNTS = "rows:"


@dataclass(frozen=True)
class PixelFormat:
    """How a processor's image tensors are stored, stacked and normalised; found by `probe_pixel_format`, kept with the
    prepared rows.

    Attributes:
        raw: stored as resized uint8 and normalised here; else stored as the processor's own floats.
        scale, mean, std: `(pixel * scale - mean) / std` for each of the three channels.
        channels_last_dim: channels are the outer part of the last dimension (Qwen's flattened patches), not
        dimension -3.
        per_row: dimension 0 of the image tensors is the row (Mllama, Idefics3), not the image or patch
        (LLaVA, Qwen).
    """

    raw: bool
    scale: float = 1.0
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    channels_last_dim: bool = False
    per_row: bool = False

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "PixelFormat":
        return cls(**{**values, "mean": tuple(values["mean"]), "std": tuple(values["std"])})

    def normalize(
        self, batch: dict[str, torch.Tensor], dtype: torch.dtype = torch.float32
    ) -> dict[str, torch.Tensor]:
        """The batch with `pixel_values` as the processor itself would give them: normalised, and zero where
        there is no image."""
        pixels = batch.get("pixel_values")
        if pixels is None or pixels.dtype != torch.uint8:
            return batch
        shape = (3, 1) if self.channels_last_dim else (3, 1, 1)
        constants = (
            torch.tensor(values, dtype=torch.float32).view(shape) for values in (self.mean, self.std)
        )
        mean, std = (
            values.to(pixels.device, non_blocking=True) for values in constants
        )  # or they would wait for the device
        values = pixels.float()
        if self.channels_last_dim:
            values = ((values.unflatten(-1, (3, -1)) * self.scale - mean) / std).flatten(-2)
        else:
            values = (values * self.scale - mean) / std
        return {**batch, "pixel_values": (values * self._present(batch)).to(dtype)}

    def _present(self, batch: dict[str, torch.Tensor]) -> torch.Tensor | float:
        """1 where a pixel belongs to an image and 0 in tiles and borders that only pad, in a shape that
        broadcasts over the pixels."""
        if (
            "aspect_ratio_mask" in batch
        ):  # [rows, images, tiles]; its first tile is also set for images that are not there
            there = batch["aspect_ratio_mask"].bool() & (batch["aspect_ratio_ids"] > 0)[..., None]
            return there[..., None, None, None].float()
        if "pixel_attention_mask" in batch:  # [rows, images, height, width]
            return batch["pixel_attention_mask"].bool()[..., None, :, :].float()
        return 1.0


def probe_pixel_format(processor: Any) -> PixelFormat:
    """Find out by trying how this processor's pixels can be stored and stacked.

    Resized uint8 pixels are used only if normalising them here gives the processor's own floats on two
    images of different shape.
    """
    images = [gradient_image(90, 60), gradient_image(50, 130)]
    as_given = RowEncoder(processor)
    messages = [[_question(1)], [_question(2)]]
    rows = [as_given.encode(messages[0], images[:1]), as_given.encode(messages[1], images)]
    texts = [as_given.chat_text(message) for message in messages]
    together = processor(text=texts, images=[images[:1], images], padding=True, return_tensors="np")
    per_row = len(together["pixel_values"]) == 2
    whole = PixelFormat(raw=False, per_row=per_row)
    image_processor = processor.image_processor
    if not (
        getattr(image_processor, "do_normalize", False) and getattr(image_processor, "do_rescale", False)
    ):
        return whole
    scale, mean, std = (
        float(image_processor.rescale_factor),
        tuple(image_processor.image_mean),
        tuple(image_processor.image_std),
    )
    try:
        raw_row = RowEncoder(processor, raw_pixels=True).encode(messages[1], images)
    except ValueError:  # resized pixels are not whole numbers: keep floats
        return whole
    stored = {name: torch.from_numpy(value) for name, value in raw_row.tensors.items()}
    expected = torch.from_numpy(np.asarray(rows[1].tensors["pixel_values"], dtype=np.float32))
    for last in (False, True):
        pixels = PixelFormat(True, scale, mean, std, channels_last_dim=last, per_row=per_row)
        if not last and stored["pixel_values"].shape[-3:-2] != (3,):
            continue
        if last and stored["pixel_values"].shape[-1] % 3:
            continue
        if torch.allclose(pixels.normalize(stored)["pixel_values"], expected, atol=1e-5):
            return pixels
    return whole


def collate(
    examples: Sequence[EncodedExample],
    *,
    pad_token_id: int,
    per_row: bool,
    filler: bool = False,
    multiple: int = 1,
) -> dict[str, np.ndarray]:
    """Stack examples into one batch, padded on the right.

    Args:
        per_row: see `PixelFormat`.
        filler: the rows are only there to keep ranks in step: no token of them is labelled.
        multiple: pad the length to a multiple of this many tokens.

    Returns:
        `input_ids`, `attention_mask`, `labels` of shape `[B, T]` int64, the model's other tensors, and
        `COUNTS` of those of them that
        are not one to a row; `parts` takes these out again.
    """
    length = -(-max(len(example.input_ids) for example in examples) // multiple) * multiple
    batch = {
        "input_ids": _stack([example.input_ids for example in examples], length, pad_token_id),
        "attention_mask": _stack([np.ones(len(example.input_ids)) for example in examples], length, 0),
        "labels": _stack([example.labels for example in examples], length, IGNORED),
    }
    if filler:
        batch["labels"][:] = IGNORED
    for name in sorted({name for example in examples for name in example.tensors}):
        parts = [example.tensors.get(name) for example in examples]
        if name in SEQUENCE_TENSORS:
            batch[name] = _concatenate([_lengthen(part, length) for part in _with_blanks(parts)])
        else:
            batch[name] = _concatenate(
                _with_blanks(parts) if per_row else [part for part in parts if part is not None]
            )
            if not per_row:
                batch[COUNTS + name] = np.array(
                    [0 if part is None else len(part) for part in parts], dtype=np.int64
                )
    if (
        "aspect_ratio_mask" in batch
    ):  # as Mllama's processor does: its attention needs a tile even where there is no image
        batch["aspect_ratio_mask"][..., 0] = 1
    return batch


def split_batch(batch: dict[str, torch.Tensor], size: int) -> Iterator[dict[str, torch.Tensor]]:
    """The batch as the model takes it, `size` rows at a time; all of them in one part where `size` is large
    enough."""
    ends = {
        name.removeprefix(COUNTS): [0, *counts.cumsum(0).tolist()]
        for name, counts in batch.items()
        if name.startswith(COUNTS)
    }
    rows = len(batch["input_ids"])
    for first in range(0, rows, size):
        last = min(first + size, rows)
        part = {}
        for name, tensor in batch.items():
            if name in ends:
                tensor = tensor[ends[name][first] : ends[name][last]]
            elif not name.startswith(COUNTS):
                tensor = tensor[first:last]
            if not name.startswith(COUNTS) and len(tensor):  # rows without an image have no image tensors
                part[name] = tensor
        yield part


def _stack(rows: list[np.ndarray], length: int, fill: int) -> np.ndarray:
    out = np.full((len(rows), length), fill, dtype=np.int64)
    for index, row in enumerate(rows):
        out[index, : len(row)] = row
    return out


def _with_blanks(parts: list[np.ndarray | None]) -> list[np.ndarray]:
    """The parts with an empty one, of one row and no image, where a text-only row has none."""
    shape = next(part.shape for part in parts if part is not None)
    kind = next(part.dtype for part in parts if part is not None)
    return [np.zeros((1, *([0] * (len(shape) - 1))), dtype=kind) if part is None else part for part in parts]


def _lengthen(part: np.ndarray, length: int) -> np.ndarray:
    """Pad dimension 1, the tokens, with zeros up to `length`."""
    return np.pad(part, [(0, 0), (0, length - part.shape[1])] + [(0, 0)] * (part.ndim - 2))


def _concatenate(parts: list[np.ndarray]) -> np.ndarray:
    """Join along dimension 0 after padding every other dimension with zeros to the largest."""
    largest = [max(sizes) for sizes in zip(*(part.shape[1:] for part in parts), strict=True)]
    gaps = [
        [(0, 0)] + [(0, most - size) for most, size in zip(largest, part.shape[1:], strict=True)]
        for part in parts
    ]
    padded = [
        np.pad(part, gap) if any(after for _, after in gap) else part
        for part, gap in zip(parts, gaps, strict=True)
    ]
    return np.concatenate(padded)


def gradient_image(width: int, height: int) -> Image.Image:
    """A picture with a gradient in every channel, so that wrong channels, scales and borders show."""
    y, x = np.mgrid[0:height, 0:width]
    return Image.fromarray(
        np.stack([x * 255 // width, y * 255 // height, (x + y) % 256], axis=-1).astype(np.uint8)
    )


def _question(images: int) -> dict[str, Any]:
    return {
        "role": "user",
        "content": [{"type": "image"}] * images + [{"type": "text", "text": "what is this"}],
    }
