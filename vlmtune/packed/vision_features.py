"""Cached vision features: the frozen vision tower's output for a row is the same for all trials and epochs.

Each row is computed by itself, so its features do not depend on the rows beside it when it is first needed.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.mllama.modeling_mllama import MllamaModel

from vlmtune.data.collate import collate
from vlmtune.data.store import StoreMeta
from vlmtune.model.transfer import to_device
from vlmtune.packed.passes import PIXELS, PassRow

# Model types whose decoders read nothing else of the vision tower. Qwen3-VL's also read inner layers.
FAMILIES = ("llava", "mllama", "qwen2_5_vl")
# Of all rows. Where fewer fit in the memory, computing row by row costs more than the cache saves.
MIN_CACHED_FRACTION = 0.5


class VisionFeatures:
    """The vision features of rows by their number in the store, on the device.

    Args:
        total_rows: how many rows there are to cache.
        max_bytes: memory that their features may take.

    Attributes:
        bytes: memory that the cached features take.
    """

    def __init__(self, base: Any, meta: StoreMeta, *, total_rows: int, max_bytes: float) -> None:
        self.model, self.meta, self.total_rows, self.max_bytes = base.base_model, meta, total_rows, max_bytes
        self.device, self.dtype = base.device, base.dtype
        self.cached: dict[int, Tensor] = {}
        self.bytes = 0
        if base.config.model_type not in FAMILIES or _has_dropout(base.config.vision_config):
            self.max_bytes = 0

    def inputs(self, rows: Sequence[PassRow]) -> dict[str, Any] | None:
        """The model's inputs that replace these rows' pixels; None where the pixels have to go through it."""
        if not self.max_bytes:
            return None
        if not self.cached:
            expected = _bytes(self._compute_and_cache(rows[0])) * self.total_rows
            if expected * MIN_CACHED_FRACTION > self.max_bytes:
                self.disable()
                return None
        features = [
            self.cached[row.number] if row.number in self.cached else self._compute_and_cache(row)
            for row in rows
        ]
        if not isinstance(self.model, MllamaModel):
            return {"mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=features)}}  # type: ignore[arg-type]
        # Rows may have different numbers of images. The attention mask hides the padding.
        most = max(len(tiles) for tiles in features)
        return {"cross_attention_states": torch.cat([_pad_tiles(tiles, most) for tiles in features])}

    def disable(self) -> bool:
        """Drop the features and cache none from now on, to free memory; returns whether there were any."""
        self.cached.clear()
        self.bytes, self.max_bytes, before = 0, 0, self.bytes
        return before > 0

    def _compute_and_cache(self, row: PassRow) -> Tensor:
        """The row's features, cached if there is memory left for them."""
        features = self._compute(row)
        if self.bytes + _bytes(features) <= self.max_bytes:
            self.cached[row.number] = features
            self.bytes += _bytes(features)
        return features

    @torch.no_grad()
    def _compute(self, row: PassRow) -> Tensor:
        """`[N, D]`, N tokens of all images of the row; with Mllama `[tiles, N, D]`.

        They are copies: a captured vision tower writes its next output to the same memory.
        """
        arrays = collate([row.example], pad_token_id=self.meta.pad_token_id, per_row=self.meta.pixels.per_row)
        tensors = {
            name: to_device(torch.from_numpy(arrays[name]), self.device) for name in row.example.tensors
        }
        batch = self.meta.pixels.normalize(tensors, self.dtype)
        if isinstance(self.model, MllamaModel):
            names = (PIXELS, "aspect_ratio_ids", "aspect_ratio_mask")
            states = self.model.vision_model(**{name: batch[name] for name in names}).last_hidden_state
            features: Tensor = self.model.multi_modal_projector(states)
            return features.flatten(0, 2).clone()
        parameters = inspect.signature(self.model.get_image_features).parameters
        outputs = self.model.get_image_features(
            **{name: tensor for name, tensor in batch.items() if name in parameters}
        )
        return torch.cat(tuple(outputs.pooler_output)).clone()


def _has_dropout(vision_config: Any) -> bool:
    return any(value for name, value in vision_config.to_dict().items() if "dropout" in name)


def _bytes(features: Tensor) -> int:
    return features.numel() * features.element_size()


def _pad_tiles(tiles: Tensor, most: int) -> Tensor:
    """`[tiles, N, D]` followed by zeros, `[most, N, D]`."""
    if len(tiles) == most:
        return tiles
    return torch.cat([tiles, tiles.new_zeros(most - len(tiles), *tiles.shape[1:])])
