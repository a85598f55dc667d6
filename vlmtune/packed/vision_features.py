"""What the frozen vision tower makes of a row's pictures: the same for all trials and epochs, so it is
computed once and kept.

Each row is computed by itself: no number of it depends on the rows that stand beside it when it is first
needed.
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

# Whose decoders take nothing of the tower but these features. That of Qwen3-VL, for one, reads inner layers
# too.
FAMILIES = ("llava", "mllama", "qwen2_5_vl")
WORTH_KEEPING = 0.5  # of all rows: where fewer have room, one by one costs more than is saved


class VisionFeatures:
    """Features of rows by their number in the store, on the device.

    Args:
        rows: how many there are in all; `limit`: bytes that their features may take.
    """

    def __init__(self, base: Any, meta: StoreMeta, *, rows: int, limit: float) -> None:
        self.model, self.meta, self.rows, self.limit = base.base_model, meta, rows, limit
        self.device, self.dtype = base.device, base.dtype
        self.kept: dict[int, Tensor] = {}
        self.size = 0
        if base.config.model_type not in FAMILIES or _has_dropout(base.config.vision_config):
            self.limit = 0

    def of(self, rows: Sequence[PassRow]) -> dict[str, Any] | None:
        """What the model takes in place of these rows' pixels; None where the pixels have to go through
        it."""
        if not self.limit:
            return None
        if not self.kept and _size(self._keep(rows[0])) * self.rows * WORTH_KEEPING > self.limit:
            self.drop()
            return None
        features = [self.kept[row.number] if row.number in self.kept else self._keep(row) for row in rows]
        if not isinstance(self.model, MllamaModel):
            return {"mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=features)}}  # type: ignore[arg-type]
        most = max(
            len(tiles) for tiles in features
        )  # rows have different numbers of pictures; the mask hides what is filled up
        return {"cross_attention_states": torch.cat([_filled(tiles, most) for tiles in features])}

    def drop(self) -> bool:
        """Keep none from now on, because the memory is needed; returns whether there were any."""
        self.kept.clear()
        self.size, self.limit, before = 0, 0, self.size
        return before > 0

    def _keep(self, row: PassRow) -> Tensor:
        features = self._computed(row)
        if self.size + _size(features) <= self.limit:
            self.kept[row.number] = features
            self.size += _size(features)
        return features

    @torch.no_grad()
    def _computed(self, row: PassRow) -> Tensor:
        """`[N, D]` of all tokens of the row's pictures; of Mllama `[tiles, N, D]`."""
        arrays = collate([row.example], pad_token_id=self.meta.pad_token_id, per_row=self.meta.pixels.per_row)
        tensors = {
            name: to_device(torch.from_numpy(arrays[name]), self.device) for name in row.example.tensors
        }
        batch = self.meta.pixels.normalize(tensors, self.dtype)
        if isinstance(self.model, MllamaModel):
            seen = self.model.vision_model(
                **{name: batch[name] for name in (PIXELS, "aspect_ratio_ids", "aspect_ratio_mask")}
            )
            features: Tensor = self.model.multi_modal_projector(seen.last_hidden_state)
            return features.flatten(0, 2).clone()  # not what a recorded step will write to again
        wanted = inspect.signature(self.model.get_image_features).parameters
        outputs = self.model.get_image_features(
            **{name: tensor for name, tensor in batch.items() if name in wanted}
        )
        return torch.cat(tuple(outputs.pooler_output)).clone()


def _has_dropout(vision_config: Any) -> bool:
    return any(value for name, value in vision_config.to_dict().items() if "dropout" in name)


def _size(features: Tensor) -> int:
    """In bytes."""
    return features.numel() * features.element_size()


def _filled(tiles: Tensor, most: int) -> Tensor:
    return (
        torch.cat([tiles, tiles.new_zeros(most - len(tiles), *tiles.shape[1:])])
        if len(tiles) < most
        else tiles
    )
