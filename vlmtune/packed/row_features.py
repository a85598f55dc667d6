"""Cached vision features of packed rows: computed once for all trials and epochs.

Each row is computed by itself, so its features do not depend on the rows beside it when it is first needed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.models.mllama.modeling_mllama import MllamaModel

from vlmtune.data.collate import collate
from vlmtune.data.store import StoreMeta
from vlmtune.model.transfer import to_device
from vlmtune.model.vision_features import RowFeatures, VisionFeatures
from vlmtune.packed.passes import PIXELS, PassRow

# Of all rows. Where fewer fit in the memory, computing row by row costs more than the cache saves.
MIN_CACHED_FRACTION = 0.5


class PackedVisionFeatures:
    """The vision features of rows by their number in the store, on the device.

    Args:
        total_rows: how many rows there are to cache.
        max_bytes: memory that their features may take.
        note: takes a line for the console.
    """

    def __init__(
        self,
        base: Any,
        meta: StoreMeta,
        *,
        total_rows: int,
        max_bytes: float,
        note: Callable[[str], None],
    ) -> None:
        self.base, self.meta, self.total_rows = base, meta, total_rows
        kind = MllamaFeatures if isinstance(base.base_model, MllamaModel) else VisionFeatures
        self.cache = kind(base, max_bytes=max_bytes, note=note)

    def inputs(self, rows: Sequence[PassRow]) -> dict[str, Any] | None:
        """The model's inputs that replace these rows' pixels; None where the pixels have to go through it."""
        if not self.cache.max_bytes:
            return None
        if not self.cache.rows:
            first = self._features(rows[0])
            if first is None:
                return None
            size = sum(leaf.numel() * leaf.element_size() for leaf in first)
            if size * self.total_rows * MIN_CACHED_FRACTION > self.cache.max_bytes:
                self.cache.disable()
                return None
        features = [self._features(row) for row in rows]
        if None in features:
            return None
        return self.cache.inputs(features)  # type: ignore[arg-type]

    def disable(self) -> bool:
        """Drop the features and cache none from now on, to free memory; returns whether there were any."""
        return self.cache.disable()

    def _features(self, row: PassRow) -> RowFeatures | None:
        """The row's features, from the cache or computed alone."""
        if (cached := self.cache.cached([row.number])) is not None:
            return cached[0]
        meta = self.meta
        arrays = collate([row.example], pad_token_id=meta.pad_token_id, inputs=meta.inputs)
        tensors = {
            name: to_device(torch.from_numpy(array), self.base.device)
            for name, array in arrays.items()
            if ":" not in name
        }
        batch = meta.inputs.normalize(tensors, self.base.dtype)
        tokens = int((batch["input_ids"] == self.cache.image_token_id).sum())
        computed = self.cache.compute([row.number], [tokens], batch)
        return None if computed is None else computed[0]


class MllamaFeatures(VisionFeatures):
    """Features that cross-attention layers read: a row has `[tiles, N, D]`, N tokens of a tile."""

    def inputs(self, features: Sequence[RowFeatures]) -> dict[str, Any]:
        # Rows may have different numbers of images. The attention mask hides the padding.
        rows = [tiles for (tiles,) in features]
        most = max(len(tiles) for tiles in rows)
        return {"cross_attention_states": torch.cat([_pad_tiles(tiles, most) for tiles in rows])}

    @torch.no_grad()
    def compute(
        self, rows: Sequence[int], tokens: Sequence[int], batch: dict[str, Tensor]
    ) -> list[RowFeatures] | None:
        """The features of one row, cached if there is memory for them."""
        model = self.base.base_model
        names = (PIXELS, "aspect_ratio_ids", "aspect_ratio_mask")
        states = model.vision_model(**{name: batch[name] for name in names}).last_hidden_state
        features = [[model.multi_modal_projector(states).flatten(0, 2)]]
        self.keep(rows, features)
        return features


def _pad_tiles(tiles: Tensor, most: int) -> Tensor:
    """`[tiles, N, D]` followed by zeros, `[most, N, D]`."""
    if len(tiles) == most:
        return tiles
    return torch.cat([tiles, tiles.new_zeros(most - len(tiles), *tiles.shape[1:])])
