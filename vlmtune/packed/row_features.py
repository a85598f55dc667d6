"""Cached vision features of packed rows: computed once for all trials and epochs.

Each row is computed by itself, so its features do not depend on the rows beside it when it is first needed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from vlmtune.data.collate import collate
from vlmtune.data.store_meta import StoreMeta
from vlmtune.model.cross_attention_features import vision_features
from vlmtune.model.tower_output import RowFeatures
from vlmtune.model.transfer import to_device
from vlmtune.model.vision_features import without_pixels
from vlmtune.packed.packed_batch import PackedRow

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
        # A video's frames go through the tower in another way than images.
        has_videos = meta.video_frames is not None
        self.cache = vision_features(base, max_bytes=0 if has_videos else max_bytes, note=note)

    def inputs(self, rows: Sequence[PackedRow], length: int) -> dict[str, Any] | None:
        """The model's inputs that replace these rows' pixels; None where the pixels have to go through it.

        Args:
            length: tokens that each row is padded to.
        """
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
        positions = self.cache.position_ids([(row.number, row.tokens) for row in rows], length)
        return {**self.cache.inputs(features), **positions}  # type: ignore[arg-type]

    def disable(self) -> bool:
        """Drop the features and cache none from now on, to free memory; returns whether there were any."""
        return self.cache.disable()

    def _features(self, row: PackedRow) -> RowFeatures | None:
        """The row's features, from the cache or computed alone."""
        cached = self.cache.cached([row.number])
        known = not self.cache.has_positions or (row.number, row.tokens) in self.cache.positions
        if cached is not None and known:
            return cached[0]
        meta = self.meta
        arrays = collate([row.example], pad_token_id=meta.pad_token_id, input_format=meta.input_format)
        tensors = {
            name: to_device(torch.from_numpy(array), self.base.device)
            for name, array in arrays.items()
            if ":" not in name
        }
        batch = meta.input_format.normalize(tensors, self.base.dtype)
        if cached is not None:  # the same images under another max_length
            self.cache.add_positions(row.number, {**without_pixels(batch), **self.cache.inputs(cached)})
            return cached[0]
        tokens = int((batch["input_ids"] == self.cache.image_token_id).sum())
        return self.cache.compute(row.number, tokens, batch)
