"""Cached vision features of packed rows, which are computed once for all trials and epochs.

Each row's features are computed alone, so that they do not depend on the rows beside it.
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

# Fraction of all rows. If the features of fewer rows fit in memory, the cache costs more time than it saves.
MIN_CACHED_FRACTION = 0.5


class PackedVisionFeatures:
    """The vision features of rows, by row number in the store, on the device.

    Args:
        total_rows: the number of rows to cache.
        max_bytes: memory that the features may take.
        note: called with each line for the console.
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
        # The tower computes a video's frames in another way than images.
        has_videos = meta.video_frames is not None
        self.cache = vision_features(base, max_bytes=0 if has_videos else max_bytes, note=note)

    def inputs(self, rows: Sequence[PackedRow], length: int) -> dict[str, Any] | None:
        """The arguments of the model that replace the pixels of these rows; None if pixels are needed.

        Args:
            length: the number of tokens that each row is padded to.
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
        """Free the cached features, and cache none from now on; returns whether there were any."""
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
        if cached is not None:  # only the position ids for this max_length are missing
            self.cache.add_positions(row.number, {**without_pixels(batch), **self.cache.inputs(cached)})
            return cached[0]
        tokens = int((batch["input_ids"] == self.cache.image_token_id).sum())
        return self.cache.compute(row.number, tokens, batch)
