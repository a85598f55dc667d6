"""Examples → one padded batch, and the normalisation of its pixels on the device.

A processor that is called on a whole batch pads ids, tiles and masks in its own way. `collate` gives the
same tensors from rows that were processed one by one, so rows are prepared once and mixed in any batch.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from vlmtune.data.encoded_example import IGNORED, SEQUENCE_TENSORS, EncodedExample
from vlmtune.data.tokenize import RowEncoder

# Prefix of a batch entry of shape `[B]`: how much of a tensor's first dimension belongs to each row, for a
# tensor whose first dimension is not the row.
COUNTS = "rows:"


@dataclass(frozen=True)
class PixelFormat:
    """How the image tensors of a processor are stored, stacked and normalised.

    `probe_pixel_format` finds it, and the prepared store keeps it.

    Attributes:
        raw: stored as resized uint8 and normalised here; else stored as the processor's own floats.
        scale, mean, std: `(pixel * scale - mean) / std` for each of the three channels.
        channels_last_dim: channels are the outer part of the last dimension (Qwen's flattened patches),
            not dimension -3.
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
        """The batch with `pixel_values` as the processor itself would give them.

        They are normalised, and zero where a tile or border only pads. A batch without uint8 pixels is
        returned as it is.
        """
        pixels = batch.get("pixel_values")
        if pixels is None or pixels.dtype != torch.uint8:
            return batch
        shape = (3, 1) if self.channels_last_dim else (3, 1, 1)
        # Made on the CPU and copied without a wait: a tensor made on the device would wait for its queue.
        mean, std = (
            torch.tensor(values, dtype=torch.float32).view(shape).to(pixels.device, non_blocking=True)
            for values in (self.mean, self.std)
        )
        values = pixels.float()
        if self.channels_last_dim:
            values = ((values.unflatten(-1, (3, -1)) * self.scale - mean) / std).flatten(-2)
        else:
            values = (values * self.scale - mean) / std
        return {**batch, "pixel_values": (values * _image_mask(batch)).to(dtype)}


def _image_mask(batch: dict[str, torch.Tensor]) -> torch.Tensor | float:
    """1 where a pixel belongs to an image, 0 where it only pads; broadcasts over `pixel_values`."""
    if "aspect_ratio_mask" in batch:  # [rows, images, tiles]; its first tile is set for missing images too
        tiles = batch["aspect_ratio_mask"].bool() & (batch["aspect_ratio_ids"] > 0)[..., None]
        return tiles[..., None, None, None].float()
    if "pixel_attention_mask" in batch:  # [rows, images, height, width]
        return batch["pixel_attention_mask"].bool()[..., None, :, :].float()
    return 1.0


def probe_pixel_format(processor: Any) -> PixelFormat:
    """Find by trying how this processor's pixels can be stored and stacked.

    Resized uint8 pixels are used only if normalising them here gives the processor's own floats, for two
    images of different shape.
    """
    images = [gradient_image(90, 60), gradient_image(50, 130)]
    encoder = RowEncoder(processor)
    messages = [[_question(1)], [_question(2)]]
    expected = encoder.encode(messages[1], images).tensors["pixel_values"]
    texts = [encoder.chat_text(message) for message in messages]
    batch = processor(text=texts, images=[images[:1], images], padding=True, return_tensors="np")
    per_row = len(batch["pixel_values"]) == 2
    floats = PixelFormat(raw=False, per_row=per_row)
    settings = processor.image_processor
    if not (getattr(settings, "do_normalize", False) and getattr(settings, "do_rescale", False)):
        return floats
    try:
        row = RowEncoder(processor, raw_pixels=True).encode(messages[1], images)
    except ValueError:  # its resized pixels are not whole numbers
        return floats
    stored = {name: torch.from_numpy(value) for name, value in row.tensors.items()}
    shape = stored["pixel_values"].shape
    for channels_last_dim in (False, True):
        if shape[-1] % 3 if channels_last_dim else shape[-3:-2] != (3,):
            continue
        pixels = PixelFormat(
            raw=True,
            scale=float(settings.rescale_factor),
            mean=tuple(settings.image_mean),
            std=tuple(settings.image_std),
            channels_last_dim=channels_last_dim,
            per_row=per_row,
        )
        normalized = pixels.normalize(stored)["pixel_values"]
        if torch.allclose(normalized, torch.from_numpy(np.asarray(expected, np.float32)), atol=1e-5):
            return pixels
    return floats


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
        filler: the rows only keep ranks in step; none of their tokens is labelled.
        multiple: pad the length to a multiple of this many tokens.

    Returns:
        `input_ids`, `attention_mask`, `labels` of shape `[B, T]` int64, the model's other tensors, and
        `COUNTS` entries for those of them whose first dimension is not the row. `split_batch` takes these
        out again.
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
        tensors = [example.tensors.get(name) for example in examples]
        if name in SEQUENCE_TENSORS:
            batch[name] = _concatenate([_lengthen(tensor, length) for tensor in _with_blanks(tensors)])
        elif per_row:
            batch[name] = _concatenate(_with_blanks(tensors))
        else:
            batch[name] = _concatenate([tensor for tensor in tensors if tensor is not None])
            counts = [0 if tensor is None else len(tensor) for tensor in tensors]
            batch[COUNTS + name] = np.array(counts, dtype=np.int64)
    if "aspect_ratio_mask" in batch:
        # As Mllama's processor does: its attention needs a tile even where a row has no image.
        batch["aspect_ratio_mask"][..., 0] = 1
    return batch


def split_batch(batch: dict[str, torch.Tensor], size: int) -> Iterator[dict[str, torch.Tensor]]:
    """The batch as the model takes it, `size` rows at a time; whole where it has no more rows than that."""
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


def gradient_image(width: int, height: int) -> Image.Image:
    """An image with a gradient in every channel, so that wrong channels, scales and borders show."""
    y, x = np.mgrid[0:height, 0:width]
    channels = [x * 255 // width, y * 255 // height, (x + y) % 256]
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


def _stack(rows: list[np.ndarray], length: int, fill: int) -> np.ndarray:
    out = np.full((len(rows), length), fill, dtype=np.int64)
    for index, row in enumerate(rows):
        out[index, : len(row)] = row
    return out


def _with_blanks(tensors: list[np.ndarray | None]) -> list[np.ndarray]:
    """The tensors with an empty one, of one row and no image, where a text-only row has none."""
    shape, dtype = next((tensor.shape, tensor.dtype) for tensor in tensors if tensor is not None)
    blank = np.zeros((1, *([0] * (len(shape) - 1))), dtype=dtype)
    return [blank if tensor is None else tensor for tensor in tensors]


def _lengthen(tensor: np.ndarray, length: int) -> np.ndarray:
    """Pad dimension 1, the tokens, with zeros up to `length`."""
    return np.pad(tensor, [(0, 0), (0, length - tensor.shape[1])] + [(0, 0)] * (tensor.ndim - 2))


def _concatenate(tensors: list[np.ndarray]) -> np.ndarray:
    """Join along dimension 0 after padding every other dimension with zeros to the largest."""
    largest = [max(sizes) for sizes in zip(*(tensor.shape[1:] for tensor in tensors), strict=True)]
    padded = []
    for tensor in tensors:
        missing = [most - size for most, size in zip(largest, tensor.shape[1:], strict=True)]
        gaps = [(0, 0), *((0, after) for after in missing)]
        padded.append(np.pad(tensor, gaps) if any(missing) else tensor)
    return np.concatenate(padded)


def _question(images: int) -> dict[str, Any]:
    text = {"type": "text", "text": "what is this"}
    return {"role": "user", "content": [{"type": "image"}] * images + [text]}
