"""Limits of a processor's image resolution: `--max_pixels`, `--min_pixels`, `--max_image_tiles`.

Two kinds of processors have a limit that can be set. Those of Qwen2-VL, GLM-4V and similar models keep an
image's aspect ratio and limit its number of pixels. Others cut an image into tiles and limit the number of
tiles. What a limit does is found by trying it, not from a list of models.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from vlmtune.errors import ConfigError

# Attributes of image processors: {largest number of tiles of an image: smallest number of tiles}.
TILE_LIMITS = {
    "max_patches": "min_patches",
    "max_image_tiles": "min_image_tiles",
    "max_num_tiles": "min_num_tiles",
    "max_tiles": "min_tiles",
}
CELLS = 8  # side of the square image on which a limit is tried, in image tokens
WIDE, HIGH = 1280, 320  # pixels of the image on which a tile limit is tried; 4 square tiles fit it best


@dataclass(frozen=True)
class ImageResolution:
    """Limits that replace a processor's own; None keeps the processor's limit.

    Attributes:
        max_pixels, min_pixels: largest and smallest number of pixels of a resized image.
        max_image_tiles: largest number of tiles of an image, not counting a thumbnail of the whole image.
    """

    max_pixels: int | None = None
    min_pixels: int | None = None
    max_image_tiles: int | None = None

    def __bool__(self) -> bool:
        return self != PROCESSORS_OWN

    def __str__(self) -> str:
        """The limits as flags: `--max_pixels 200704`."""
        given = {name: value for name, value in vars(self).items() if value is not None}
        return " ".join(f"--{name} {value}" for name, value in given.items()) or "the processor's own"

    def apply(self, processor: Any, model: str) -> None:
        """Set the limits of a processor.

        Args:
            model: the model's name, for messages.

        Raises:
            ConfigError: the processor has no such limit, or cannot have such a value.
        """
        if self.max_pixels is not None or self.min_pixels is not None:
            self._set_pixels(processor, model)
        if self.max_image_tiles is not None:
            _set_tiles(processor, self.max_image_tiles, model)

    def _set_pixels(self, processor: Any, model: str) -> None:
        image_processor = processor.image_processor
        flag = "--max_pixels" if self.max_pixels is not None else "--min_pixels"
        frames = frames_of_an_image(image_processor)
        if frames is None:
            instead = "; give --max_image_tiles" if tile_limit(processor) else "; leave it out"
            raise ConfigError(
                f"{flag}: the processor of {model} ({type(image_processor).__name__}) has no limit of "
                f"pixels{instead}"
            )
        size = image_processor.size
        own_min, own_max = size["shortest_edge"] // frames, size["longest_edge"] // frames
        token = cell(image_processor) ** 2
        max_pixels = own_max if self.max_pixels is None else self.max_pixels
        if max_pixels < token:
            raise ConfigError(
                f"--max_pixels {max_pixels}: one image token of {model} has {token} pixels already"
            )
        min_pixels = min(own_min, max_pixels) if self.min_pixels is None else self.min_pixels
        if min_pixels > max_pixels:
            raise ConfigError(
                f"--min_pixels {min_pixels}: is more than the {max_pixels} pixels that images may have; "
                "give a larger "
                "--max_pixels too"
            )
        image_processor.size = {"shortest_edge": min_pixels * frames, "longest_edge": max_pixels * frames}


PROCESSORS_OWN = ImageResolution()


def cell(image_processor: Any) -> int:
    """Side of the square that one image token stands for, in pixels."""
    return int(image_processor.patch_size) * int(image_processor.merge_size)


def frames_of_an_image(image_processor: Any) -> int | None:
    """As how many frames the processor counts an image in its limit of pixels; None if it has no such limit.

    GLM-4V pads an image to two frames and counts both; Qwen2-VL counts one.
    """
    size = getattr(image_processor, "size", None) or {}
    names = ("shortest_edge", "longest_edge")
    if "image_grid_thw" not in image_processor.model_input_names or not all(map(size.get, names)):
        return None
    side = CELLS * cell(image_processor)
    tried = copy.copy(image_processor)
    for frames in (1, int(getattr(image_processor, "temporal_patch_size", 1))):
        tried.size = {"shortest_edge": side, "longest_edge": frames * side**2}
        patches = tried.get_number_of_image_patches(4 * side, 4 * side)
        if patches * image_processor.patch_size**2 == side**2:
            return frames
    return None


def tile_limit(processor: Any) -> str | None:
    """The attribute with the image processor's limit of tiles; None if none exists or can be changed."""
    image_processor = processor.image_processor
    if not {"aspect_ratio_ids", "image_grid_thw"}.isdisjoint(image_processor.model_input_names):
        return None  # the model numbers the arrangements of tiles, or counts patches and not tiles
    for name in TILE_LIMITS:
        if isinstance(getattr(image_processor, name, None), int):
            one, four = (_pixels(processor, name, tiles) for tiles in (1, 4))
            return name if one < four else None
    return None


def _set_tiles(processor: Any, tiles: int, model: str) -> None:
    image_processor, name = processor.image_processor, tile_limit(processor)
    if name is None:
        fixed = "aspect_ratio_ids" in image_processor.model_input_names
        reason = (
            "numbers the arrangements of tiles as the model has learnt them"
            if fixed
            else "has no limit of tiles"
        )
        instead = "; give --max_pixels" if frames_of_an_image(image_processor) else "; leave it out"
        which = f"the processor of {model} ({type(image_processor).__name__})"
        raise ConfigError(f"--max_image_tiles: {which} {reason}{instead}")
    _limit_tiles(image_processor, name, tiles)


def _limit_tiles(image_processor: Any, name: str, tiles: int) -> None:
    setattr(image_processor, name, tiles)
    least = getattr(image_processor, TILE_LIMITS[name], None)
    if least is not None and least > tiles:
        setattr(image_processor, TILE_LIMITS[name], tiles)


def _pixels(processor: Any, name: str, tiles: int) -> int:
    """Number of pixel values that the processor makes from a wide image with this limit of tiles."""
    from PIL import Image

    tried = copy.copy(processor)
    tried.image_processor = copy.copy(processor.image_processor)
    _limit_tiles(tried.image_processor, name, tiles)
    image = Image.new("RGB", (WIDE, HIGH))
    features = tried(images=[image], text=[processor.image_token], return_tensors="pt")
    return int(features["pixel_values"].numel())
