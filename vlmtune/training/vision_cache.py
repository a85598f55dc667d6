"""Cached vision features of isolated training: the frozen tower computes each row once.

Each row is computed alone, so its features do not depend on the rows beside it, nor on whether the run was
resumed.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from vlmtune.data.collate import split_batch
from vlmtune.data.split import EVAL
from vlmtune.model.cross_attention_features import vision_features
from vlmtune.model.fast import decoder_and_other_parts
from vlmtune.model.memory import size_text
from vlmtune.model.tower_output import RowFeatures
from vlmtune.model.transfer import to_device
from vlmtune.model.vision_features import without_pixels
from vlmtune.training.batches import ROW_NUMBERS, Batch, WorkerBatches


class VisionCache:
    """Replaces the pixels of a batch's rows by cached vision features.

    Args:
        base: the model without PEFT's wrapper.
        max_bytes: memory that the features may take.
        note: called with each line for the console.
        autocast: the context manager in which the trainer computes a loss.
    """

    def __init__(
        self,
        base: Any,
        batches: WorkerBatches,
        *,
        max_bytes: float,
        note: Callable[[str], None],
        autocast: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self.base, self.batches, self.note, self.autocast = base, batches, note, autocast
        has_videos = batches.store.meta.video_frames is not None
        self.features = vision_features(base, max_bytes=0 if has_videos else max_bytes, note=note)
        vision_parts = decoder_and_other_parts(base)[1:]
        if any(parameter.requires_grad for part in vision_parts for parameter in part.parameters()):
            self.disable()

    def add(self, batch: Batch) -> None:
        """Cache the features of the rows with images in a batch, as far as there is memory."""
        if not self.features.max_bytes:
            return
        tokens, keys = self._tokens(batch), _keys(batch)
        for count, key, row in zip(tokens, keys, split_batch(batch, 1), strict=True):
            if count and self.features.cached([key[0]]) is None:
                with self.autocast():
                    features = self.features.compute(key[0], count, self._on_device(row))
                if features is None or not self._room_for_all(features):
                    return
            elif self.features.has_positions and not count and key not in self.features.positions:
                self.features.add_positions(key[0], self._on_device(row))

    def inputs(self, batch: Batch) -> Batch:
        """The model's inputs for a batch or micro-batch, on the device; with features if all are cached."""
        keys = _keys(batch)
        counts = self._tokens(batch)
        rows = [
            self.features.rows.get(number) if count else None
            for (number, _), count in zip(keys, counts, strict=True)
        ]
        complete = all((row is None) == (not count) for row, count in zip(rows, counts, strict=True))
        if not complete or not any(counts):
            return self._on_device(batch)
        positions = self.features.position_ids(keys, batch["input_ids"].shape[1])
        moved = self._on_device(without_pixels(batch))
        return {**moved, **self.features.batch_inputs(rows, moved), **positions}

    def disable(self) -> bool:
        """Free the cached features, and cache none from now on; returns whether there were any."""
        return self.features.disable()

    def _room_for_all(self, features: RowFeatures) -> bool:
        """Whether the features of all rows fit in memory, estimated from those of one row.

        If not, caching is switched off: a batch goes through the tower as a whole if one of its rows is not
        cached.
        """
        size = sum(tensor.numel() * tensor.element_size() for tensor in features)
        store = self.batches.store
        rows = len(self.batches.usable_rows) + len(store.rows_of(EVAL))
        if size * rows <= self.features.max_bytes:
            return True
        self.disable()
        self.note(
            f"vision features are not cached: {rows} rows take {size_text(size * rows)} of GPU memory, and "
            "that is not free; pixels go through the tower in every epoch"
        )
        return False

    def _tokens(self, batch: Batch) -> list[int]:
        """The number of image tokens of each row."""
        counts: list[int] = (batch["input_ids"] == self.features.image_token_id).sum(1).tolist()
        return counts

    def _on_device(self, batch: Batch) -> Batch:
        """The batch on the device, with pixels normalized and in the base's dtype."""
        device = self.base.device
        moved = {name: to_device(tensor, device) for name, tensor in batch.items() if name != ROW_NUMBERS}
        return self.batches.store.meta.input_format.normalize(moved, self.base.dtype)


def _keys(batch: Batch) -> list[tuple[int, int]]:
    """(row number in the store, number of tokens) of each row."""
    return list(zip(batch[ROW_NUMBERS].tolist(), batch["attention_mask"].sum(1).tolist(), strict=True))
