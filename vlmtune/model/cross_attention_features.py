"""Cached vision features of Mllama, whose cross-attention layers read the tiles of an image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from transformers.models.mllama.modeling_mllama import MllamaModel

from vlmtune.model.tower_output import RowFeatures
from vlmtune.model.vision_features import Batch, VisionFeatures

IMAGE_INPUTS = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")  # [1, images, ...] for one row


def vision_features(base: Any, *, max_bytes: float, note: Callable[[str], None]) -> VisionFeatures:
    """An empty cache of vision features for this base."""
    kind = MllamaFeatures if isinstance(base.base_model, MllamaModel) else VisionFeatures
    return kind(base, max_bytes=max_bytes, note=note)


class MllamaFeatures(VisionFeatures):
    """Vision features that cross-attention layers read.

    A row's features are `[tiles, N, D]`, N tokens for a tile.

    Rows of a batch may have different numbers of images. Their features are padded, and the attention mask
    hides the padding.
    """

    def inputs(self, features: Sequence[RowFeatures]) -> dict[str, Any]:
        rows = [tiles for (tiles,) in features]
        most = max(len(tiles) for tiles in rows)
        return {"cross_attention_states": torch.cat([_pad_tiles(tiles, most) for tiles in rows])}

    def batch_inputs(self, features: Sequence[RowFeatures | None], batch: Batch) -> dict[str, Any]:
        tiles = prod(batch["cross_attention_mask"].shape[2:])  # [B, T, images, tiles of an image]
        first = next(row[0] for row in features if row is not None)
        blank = first[:0]
        rows = [_pad_tiles(blank if row is None else row[0], tiles) for row in features]
        return {"cross_attention_states": torch.cat(rows)}

    @torch.no_grad()
    def compute(self, row: int, tokens: int, batch: Batch) -> RowFeatures | None:
        """The features of one row, cached if there is memory for them."""
        model = self.base.base_model
        images = int((batch["aspect_ratio_ids"] > 0).sum())  # 0 marks padding images
        inputs = {name: batch[name][:, :images] for name in IMAGE_INPUTS}
        states = model.vision_model(**inputs).last_hidden_state
        features = [model.multi_modal_projector(states).flatten(0, 2)]
        self.keep(row, features)
        return features


def _pad_tiles(tiles: Tensor, most: int) -> Tensor:
    """`[tiles, N, D]` padded with zeros to `[most, N, D]`."""
    if len(tiles) == most:
        return tiles
    return torch.cat([tiles, tiles.new_zeros(most - len(tiles), *tiles.shape[1:])])
