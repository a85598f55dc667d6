"""Cached vision features of a run that trains alone: each row's image goes through a frozen tower once.

Rows are computed one by one, so a row's features do not depend on the rows beside it, nor on whether the run
was resumed.
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
    """The vision features of rows, in place of their pixels.

    Args:
        base: the model without PEFT's wrapper.
        max_bytes: memory that the features may take.
        note: takes a line for the person who watches.
        autocast: the context in which the trainer computes a loss.
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
        """Cache the features of a batch's rows with images, as far as there is memory."""
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
        """The model's inputs for a batch or a part of it, on the device: features where all are cached."""
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
        """Drop the features and cache none from now on, to free memory; returns whether there were any."""
        return self.features.disable()

    def _room_for_all(self, features: RowFeatures) -> bool:
        """Whether the features of all rows fit, by those of one. Else they are dropped: a batch with a row
        that is not cached goes through the tower as a whole."""
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
        """A batch as the model takes it, its pixels normalised to the base's dtype."""
        device = self.base.device
        moved = {name: to_device(tensor, device) for name, tensor in batch.items() if name != ROW_NUMBERS}
        return self.batches.store.meta.input_format.normalize(moved, self.base.dtype)


def _keys(batch: Batch) -> list[tuple[int, int]]:
    """The number of each row in the store, and its tokens."""
    return list(zip(batch[ROW_NUMBERS].tolist(), batch["attention_mask"].sum(1).tolist(), strict=True))
