"""How each model family writes boxes and points in texts; `BoxWriter` writes a row's boxes for one model.

Only this module knows families by name, because no processor tells in which units its model was taught to
give coordinates. Sources: the families' own model cards and cookbooks, and the templates of ms-swift.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from vlmtune.data.objects import BOX_MARK, REF_MARK, Objects, format_box
from vlmtune.data.template_rendering import EncodeError
from vlmtune.model_ref import ModelRef

Message = dict[str, Any]
Size = tuple[int, int]  # width, height
AUTO = "auto"
MARKS = re.compile(f"{REF_MARK.pattern}|{BOX_MARK.pattern}")


@dataclass(frozen=True)
class BoxFormat:
    """How a family writes boxes and points.

    Attributes:
        unit: what a coordinate is: pixels of the image in the file ("original"), pixels of the image that the
            processor resized ("resized"), or a share of the image's width or height ("share").
        scale: what a share is multiplied by.
        largest: the largest coordinate, if it is below the scale.
        decimals: number of decimals of a coordinate.
        box, point, ref: templates of a box, of a point, and of the name of what is in a box.
    """

    unit: Literal["original", "resized", "share"]
    scale: int = 1
    largest: int | None = None
    decimals: int = 0
    box: str = "[{x1}, {y1}, {x2}, {y2}]"
    point: str = "[{x1}, {y1}]"
    ref: str = "{ref}"


BOX_FORMATS = {
    "absolute": BoxFormat("original"),
    "absolute_resized": BoxFormat("resized"),
    "norm1000": BoxFormat("share", scale=1000),
    "norm1": BoxFormat("share", decimals=3),
    "qwen2_vl": BoxFormat(
        "share",
        scale=1000,
        largest=999,
        box="<|box_start|>({x1},{y1}),({x2},{y2})<|box_end|>",
        point="<|box_start|>({x1},{y1})<|box_end|>",
        ref="<|object_ref_start|>{ref}<|object_ref_end|>",
    ),
    "internvl": BoxFormat(
        "share",
        scale=1000,
        box="<box>[[{x1}, {y1}, {x2}, {y2}]]</box>",
        point="<box>[[{x1}, {y1}]]</box>",
        ref="<ref>{ref}</ref>",
    ),
}
FORMAT_OF_MODEL = {
    "qwen2_vl": "qwen2_vl",
    "qwen2_5_vl": "absolute_resized",
    "qwen3_vl": "norm1000",
    "qwen3_vl_moe": "norm1000",
    "qwen3_5": "norm1000",
    "qwen3_5_moe": "norm1000",
    "internvl": "internvl",
    "glm4v": "norm1000",
    "glm4v_moe": "norm1000",
    "glm46v": "norm1000",
}
CHOICES = (AUTO, *BOX_FORMATS)


def box_format_name(model: ModelRef, choice: str) -> str:
    """The key of BOX_FORMATS that `--box_format` means for a model; "unknown MODEL_TYPE" if none is known.

    A folder that holds a processor and no config.json has no known format: its rows with boxes are
    refused, others are not.

    Raises:
        ModelError: the model is not there.
    """
    if choice != AUTO:
        return choice
    folder = Path(model.name)
    if folder.is_dir() and not (folder / "config.json").exists():
        return "unknown model without config.json"
    model_type = str(model.config().model_type)
    return FORMAT_OF_MODEL.get(model_type, f"unknown {model_type}")


class BoxWriter:
    """Writes the boxes of rows for one model.

    Args:
        name: from `box_format_name`.
    """

    def __init__(self, name: str, image_processor: Any) -> None:
        self.name = name
        self.format = BOX_FORMATS.get(name)
        # Images of one size are resized alike, and most data has few sizes.
        self.resized = lru_cache(maxsize=4096)(lambda size: resized_size(image_processor, size))

    def write(
        self, messages: Sequence[Message], objects: Objects, images: Sequence[Image.Image]
    ) -> list[Message]:
        """The messages with the row's boxes and refs in place of their marks.

        Raises:
            EncodeError: it is not known how the model writes boxes, or a box lies outside its image.
        """
        box_format = self.format
        if box_format is None:
            raise EncodeError(
                f"the row has boxes, and how a model of type {self.name.removeprefix('unknown ')!r} counts "
                f"is not known: say it with --box_format {', '.join(BOX_FORMATS)}"
            )
        boxes = iter(self._texts(box_format, objects, [image.size for image in images]))
        refs = iter(box_format.ref.format(ref=ref) for ref in objects["refs"])

        def text(mark: re.Match[str]) -> str:
            return next(boxes if mark.group() == "<bbox>" else refs)

        return [
            {**message, "content": [_filled(part, text) for part in message["content"]]}
            for message in messages
        ]

    def _texts(self, box_format: BoxFormat, objects: Objects, sizes: Sequence[Size]) -> list[str]:
        for size, (width, height) in zip(sizes, objects["sizes"], strict=False):
            if size != (width, height):
                raise EncodeError(
                    f"objects.width and objects.height say {width}x{height} pixels, and the image has "
                    f"{size[0]}x{size[1]}: the boxes are of another image"
                )
        texts = []
        for number, (box, image) in enumerate(zip(objects["boxes"], objects["images"], strict=True)):
            size = sizes[image]
            shares = _shares(box, objects["unit"], size, f"objects.bbox[{number}]")
            numbers = [_number(box_format, share, axis, size, self) for axis, share in enumerate(shares)]
            names = dict(zip(("x1", "y1", "x2", "y2"), numbers, strict=False))
            texts.append((box_format.box if len(box) == 4 else box_format.point).format(**names))
        return texts


def resized_size(image_processor: Any, size: Size) -> Size:
    """The size to which a processor resizes a whole image, found by trying it on a drawn image.

    Raises:
        EncodeError: the processor crops, pads or tiles images, so there is no such size.
    """
    image = gradient(size)
    features = image_processor(images=[image], do_rescale=False, do_normalize=False, return_tensors="pt")
    if "image_grid_thw" in features:
        _, rows, columns = (int(number) for number in features["image_grid_thw"][0])
        return columns * int(image_processor.patch_size), rows * int(image_processor.patch_size)
    pixels = np.asarray(features["pixel_values"], dtype=float)
    whole = pixels.ndim == 4 and pixels.shape[:2] == (1, 3)
    corners = pixels[0][:2, [0, -1], [0, -1]] if whole else np.zeros((2, 2))
    if not whole or np.abs(corners - [[0, 255], [0, 255]]).max() > 32:
        raise EncodeError(
            "boxes in pixels of the resized image: this model's processor crops, pads or tiles images, so "
            "there is no such size; give --box_format norm1000, norm1 or absolute"
        )
    return pixels.shape[3], pixels.shape[2]


def gradient(size: Size) -> Image.Image:
    """An image whose red value grows from left to right and whose green value grows from top to bottom."""
    width, height = size
    channels = np.zeros((height, width, 3), np.uint8)
    channels[..., 0] = np.linspace(0, 255, width)[None]
    channels[..., 1] = np.linspace(0, 255, height)[:, None]
    return Image.fromarray(channels)


def _filled(part: dict[str, Any], text: Any) -> dict[str, Any]:
    return part if part["type"] != "text" else {**part, "text": MARKS.sub(text, part["text"])}


def _shares(box: Sequence[float], unit: str, size: Size, field: str) -> list[float]:
    """The coordinates of a box as shares of its image's width and height.

    Raises:
        EncodeError: it lies outside the image.
    """
    whole = size if unit == "real" else (1, 1) if unit == "norm1" else (1000, 1000)
    shares = [number / whole[axis % 2] for axis, number in enumerate(box)]
    if not all(0 <= share <= 1 for share in shares):
        limits = f"{size[0]}x{size[1]} pixels" if unit == "real" else f"0 to {whole[0]} ({unit})"
        raise EncodeError(f"{field} {format_box(box)} lies outside its image of {limits}")
    return shares


def _number(box_format: BoxFormat, share: float, axis: int, size: Size, writer: BoxWriter) -> str:
    whole = {
        "original": lambda: size[axis % 2],
        "resized": lambda: writer.resized(size)[axis % 2],
        "share": lambda: box_format.scale,
    }[box_format.unit]()
    number = round(share * whole, box_format.decimals)
    if box_format.largest is not None:
        number = min(number, box_format.largest)
    return f"{number:.{box_format.decimals}f}"


__all__ = ["AUTO", "BOX_FORMATS", "CHOICES", "BoxFormat", "BoxWriter", "box_format_name"]
