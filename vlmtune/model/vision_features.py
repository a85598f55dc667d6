"""Cache a frozen vision tower's output for each row, which is the same in every epoch and trial.

For most model families, transformers takes a tower's outputs in place of pixels (`mm_encoder_outputs`). An
output has one vector for each image token of a row, in one tensor or several: Qwen3-VL's decoder also reads
inner layers of the tower. The output is split by rows, kept on the device, and joined again for the rows of a
batch.

Multimodal position ids `[3, B, T]` depend on a row's tokens and image sizes only. transformers computes them
in Python for each row of each batch, and waits for the device some seven times a row. They are cached too.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vlmtune.library_errors import LIBRARY_ERRORS, first_line, lacks_memory
from vlmtune.model.decoder_inputs import decoder_difference, decoder_inputs, takes_multimodal_positions
from vlmtune.model.tower_output import OutputLayout, RowFeatures, UnsupportedTowerError

Batch = dict[str, Tensor]

BYTES_WITHOUT_GPU = 2 * 2**30
SPARE_FRACTION = 0.8  # of the GPU memory that the plan leaves free, features may take this fraction

# Allowed relative difference between the decoder's inputs from features and from pixels, by rounding in the
# tower.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 2e-2}


class VisionFeatures:
    """The vision features of rows, by row number in the store, on the device of the base.

    The first row shows whether the model takes features in place of pixels: its decoder must get the same
    inputs. If not, pixels go through the tower every time, and a line for the console says why.

    Args:
        max_bytes: memory that the features may take.
        note: called with each line for the console.

    Attributes:
        bytes: memory that the cached features take.
        image_token_id: id of the tokens that the features replace; -1 if the model's config has none.
        rows: the cached features by row number.
        positions: the cached position ids `[3, T]` by (row number, T), if the decoder takes them on several
            axes.
    """

    def __init__(self, base: Any, *, max_bytes: float, note: Callable[[str], None]) -> None:
        self.base, self.max_bytes, self.note = base, max_bytes, note
        self.rows: dict[int, RowFeatures] = {}
        self.positions: dict[tuple[int, int], Tensor] = {}
        self.has_positions = False
        self.bytes = 0
        self.layout: OutputLayout | None = None
        names = ("image_token_id", "image_token_index")
        ids = [getattr(base.config, name, None) for name in names]
        self.image_token_id: int = next((token for token in ids if token is not None), -1)
        if not has_fixed_tower(base):
            self.max_bytes = 0

    def cached(self, rows: Sequence[int]) -> list[RowFeatures] | None:
        """The features of rows; None if the features of one of them are not cached."""
        features = [self.rows.get(row) for row in rows]
        return None if None in features else features  # type: ignore[return-value]

    def inputs(self, features: Sequence[RowFeatures]) -> dict[str, Any]:
        """The arguments of the model that replace the pixels of rows with images."""
        assert self.layout is not None, "call compute first"
        return self.layout.inputs(features)

    def batch_inputs(self, features: Sequence[RowFeatures | None], batch: Batch) -> dict[str, Any]:
        """The arguments of the model that replace the pixels of a batch.

        Args:
            features: the features of each row; None for a row without an image.
            batch: the batch without its pixels. Mllama's features are padded to its number of tiles.
        """
        return self.inputs([row for row in features if row is not None])

    def position_ids(self, keys: Sequence[tuple[int, int]], length: int) -> dict[str, Tensor]:
        """The argument `position_ids` for rows padded to `length` tokens; empty if one is not cached."""
        if not self.has_positions or any(key not in self.positions for key in keys):
            return {}
        padded = [nn.functional.pad(self.positions[key], (0, length - key[1]), value=1) for key in keys]
        return {"position_ids": torch.stack(padded, dim=1)}

    def compute(self, row: int, tokens: int, batch: Batch) -> RowFeatures | None:
        """Run the tower on one row, and cache its features if there is memory for them.

        Args:
            row: the row's number in the store.
            tokens: the row's number of image tokens.
            batch: the model's inputs for the row, with pixels, on the device. It may be padded on the right.

        Returns:
            The features; None if the pixels have to go through the model.
        """
        if not self.max_bytes:
            return None
        try:
            features, layout = self._run_tower(tokens, batch)
            inputs = {**without_pixels(batch), **layout.inputs([features])}
        except UnsupportedTowerError as error:
            self._give_up(str(error))
            return None
        if self.layout is None:
            difference = decoder_difference(self.base, batch, inputs)
            if not difference <= TOLERANCES[self.base.dtype]:
                self._give_up(f"the decoder would get other inputs (relative difference {difference:.1e})")
                return None
            self.layout = layout
            self.has_positions = takes_multimodal_positions(self.base, inputs)
        self.keep(row, features)
        self.add_positions(row, inputs)
        return features

    def keep(self, row: int, features: RowFeatures) -> None:
        """Cache the features of a row if there is memory for them."""
        size = sum(leaf.numel() * leaf.element_size() for leaf in features)
        if row not in self.rows and self.bytes + size <= self.max_bytes:
            # Copies, because a captured tower writes its next output to the same memory.
            self.rows[row] = [leaf.clone() for leaf in features]
            self.bytes += size

    def add_positions(self, row: int, inputs: dict[str, Any]) -> None:
        """Cache the position ids of a row, if the decoder takes any.

        Args:
            inputs: the model's inputs for this row alone.
        """
        if self.has_positions:
            length = int(inputs["attention_mask"].sum())
            positions = decoder_inputs(self.base, inputs).get("position_ids")
            if positions is None:  # a row without an image: every axis counts its tokens
                axes = len(next(iter(self.positions.values())))
                positions = torch.arange(length, device=self.base.device).expand(axes, 1, length)
            self.positions[row, length] = positions[:, 0, :length].clone()

    def disable(self) -> bool:
        """Free the cached features, and cache none from now on; returns whether there were any."""
        self.rows.clear()
        self.positions.clear()
        self.bytes, self.max_bytes, before = 0, 0, self.bytes
        return before > 0

    def _give_up(self, reason: str) -> None:
        self.disable()
        self.note(f"vision features are not cached, pixels go through the tower in every epoch: {reason}")

    @torch.no_grad()
    def _run_tower(self, tokens: int, batch: Batch) -> tuple[RowFeatures, OutputLayout]:
        encode = getattr(self.base.base_model, "get_image_features", None)
        if encode is None:
            raise UnsupportedTowerError(f"{type(self.base).__name__} has no get_image_features")
        known = inspect.signature(encode).parameters
        try:
            output = encode(**{name: tensor for name, tensor in batch.items() if name in known})
        except LIBRARY_ERRORS as error:
            if lacks_memory(error):
                raise
            raise UnsupportedTowerError(f"its image features fail ({first_line(error)})") from error
        layout, tensors = OutputLayout.of(output, tokens)
        return tensors, layout


def room_for_features(device: torch.device, spare_bytes: float) -> float:
    """Bytes that features may take if the memory plan leaves `spare_bytes` bytes of the GPU free."""
    return spare_bytes * SPARE_FRACTION if device.type == "cuda" else BYTES_WITHOUT_GPU


def without_pixels(batch: Batch) -> Batch:
    """The batch without pixels. Image grids stay, because position ids depend on them."""
    return {name: tensor for name, tensor in batch.items() if not is_pixels(tensor)}


def is_pixels(tensor: Tensor) -> bool:
    """Whether a tensor of a batch holds pixels: only pixels are uint8 (stored) or floats (normalized)."""
    return tensor.is_floating_point() or tensor.dtype == torch.uint8


def has_fixed_tower(base: Any) -> bool:
    """Whether the base has a vision tower without dropout, which returns the same output each time."""
    vision = getattr(base.config, "vision_config", None)
    return vision is not None and not any(
        value for name, value in vision.to_dict().items() if "dropout" in name
    )
