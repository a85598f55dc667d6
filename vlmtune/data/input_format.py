"""How the tensors that a processor makes from one row are stored, joined into a batch and normalized.

Nothing here depends on a model's name: `find_input_format` finds a processor's format by trying.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
import torch

TOKENS: Literal["tokens"] = "tokens"
ROWS: Literal["rows"] = "rows"
ITEMS: Literal["items"] = "items"
Channels = Literal["plane", "outer", "inner"]
NO_VIDEOS, FLOAT_VIDEOS, UINT8_VIDEOS = "none", "float", "uint8"


@dataclass(frozen=True)
class TensorLayout:
    """How one tensor's rows make a batch.

    Attributes:
        kind: "tokens": an axis runs along the tokens of the row; "rows": dimension 0 is the row; "items": an
            axis counts images, tiles or patches, and those of all rows are concatenated.
        axis: the axis of the tokens or items.
        ragged: whether items of one row may have different sizes; they are then joined along axis 1.
    """

    kind: Literal["tokens", "rows", "items"]
    axis: int = 0
    ragged: bool = False


@dataclass(frozen=True)
class Normalization:
    """`(pixel * scale - mean) / std` for each of three channels.

    Attributes:
        channels: where the channels are: dimension -3 ("plane"), or the "outer" or "inner" part of the last
            dimension, as in flattened patches.
    """

    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    channels: Channels = "plane"

    def fits(self, pixels: torch.Tensor) -> bool:
        """Whether pixels of this shape have three such channels."""
        if self.channels == "plane":
            return pixels.ndim > 2 and pixels.shape[-3] == 3
        return pixels.ndim > 1 and pixels.shape[-1] % 3 == 0

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """Uint8 pixels → float32."""
        shape = {"plane": (3, 1, 1), "outer": (3, 1), "inner": (3,)}[self.channels]
        # Made on the CPU and copied without waiting: making the tensor on the GPU would wait for the GPU's
        # queue.
        mean, std = (
            torch.tensor(values, dtype=torch.float32).view(shape).to(pixels.device, non_blocking=True)
            for values in (self.mean, self.std)
        )
        values = pixels.float()
        if self.channels != "plane":
            values = values.unflatten(-1, (3, -1) if self.channels == "outer" else (-1, 3))
        values = (values * self.scale - mean) / std
        return values if self.channels == "plane" else values.flatten(-2)


@dataclass(frozen=True)
class InputFormat:
    """The tensors of one processor, beside token ids and masks.

    Attributes:
        nested_images: whether the processor takes a list of images for each row, or one flat list.
        layouts: the layout of every tensor, by name.
        normalizations: for the pixel tensors that are stored as resized uint8, by name; empty if the
            processor's own floats are stored.
        videos: NO_VIDEOS if the processor takes none or was not tried; else whether their resized pixels
            (UINT8_VIDEOS) or normalized floats (FLOAT_VIDEOS) are stored.
        images_as_tensors: whether images given as tensors, which is faster, give the same results.
    """

    nested_images: bool = True
    layouts: dict[str, TensorLayout] = field(default_factory=dict)
    normalizations: dict[str, Normalization] = field(default_factory=dict)
    videos: str = NO_VIDEOS
    images_as_tensors: bool = False

    @property
    def stores_uint8_pixels(self) -> bool:
        return bool(self.normalizations)

    def token_axes(self, tensors: dict[str, np.ndarray], tokens: int) -> dict[str, int]:
        """The axis that runs along the tokens, by name, for the tensors of a row that have one.

        A tensor that only rows without an image have is in no layout; it is recognized by its shape.
        """
        axes = {}
        for name, tensor in tensors.items():
            layout = self.layouts.get(name)
            if layout is not None and layout.kind == TOKENS:
                axes[name] = layout.axis
            elif layout is None and tensor.ndim > 1 and tensor.shape[:2] == (1, tokens):
                axes[name] = 1
        return axes

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> InputFormat:
        return cls(
            values["nested_images"],
            {name: TensorLayout(**layout) for name, layout in values["layouts"].items()},
            {
                name: Normalization(one["scale"], tuple(one["mean"]), tuple(one["std"]), one["channels"])
                for name, one in values["normalizations"].items()
            },
            values["videos"],
            values["images_as_tensors"],
        )

    def normalize(
        self, batch: dict[str, torch.Tensor], dtype: torch.dtype = torch.float32
    ) -> dict[str, torch.Tensor]:
        """The batch with its pixels as the processor itself would give them, in `dtype`.

        Stored uint8 pixels are normalized. Padding (tiles and borders) is set to zero.
        """
        out = {}
        for name, tensor in batch.items():
            if name in self.normalizations and tensor.dtype == torch.uint8:
                out[name] = (self.normalizations[name](tensor) * image_mask(batch, tensor)).to(dtype)
            else:
                # Lists of numbers, such as the seconds between a video's frames, keep their precision.
                cast = tensor.is_floating_point() and tensor.ndim > 1
                out[name] = tensor.to(dtype) if cast else tensor
        return out


def image_mask(batch: dict[str, torch.Tensor], pixels: torch.Tensor) -> torch.Tensor | float:
    """1 for pixels of an image, 0 for padding; broadcasts over `pixels`."""
    if "aspect_ratio_mask" in batch:  # [rows, images, tiles]; its first tile is set for missing images too
        tiles = batch["aspect_ratio_mask"].bool() & (batch["aspect_ratio_ids"] > 0)[..., None]
        return tiles[..., None, None, None].float()
    mask = batch.get("pixel_attention_mask")
    if mask is None:
        return 1.0
    if mask.shape[-2:] == pixels.shape[-2:]:  # [rows, images, height, width]
        return mask.bool()[..., None, :, :].float()
    if mask.shape == pixels.shape[:-1]:  # [images, patches]
        return mask.bool()[..., None].float()
    return 1.0


def is_ragged(value: Any) -> bool:
    """Whether a processor's output is a list, that is, its items have different sizes."""
    return isinstance(value, list)


def as_array(value: Any, layout: TensorLayout | None = None) -> np.ndarray:
    """A processor's tensor as numpy, bfloat16 as float32.

    Args:
        layout: says how to join a list of items with different sizes.

    Raises:
        ValueError: the value is neither a tensor nor a list of tensors that can be joined.
    """
    if layout is not None and layout.ragged:
        items = [as_array(item) for item in value]
        return np.concatenate(items)[None]
    if isinstance(value, torch.Tensor):
        tensor = value.detach().cpu()
        numbers: np.ndarray = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
        return numbers
    if isinstance(value, list | tuple) and value and isinstance(value[0], torch.Tensor):
        return np.stack([as_array(item) for item in value])
    array = np.asarray(value)
    if array.dtype == object or array.dtype.kind in "US":
        raise ValueError("no tensor")
    return array
