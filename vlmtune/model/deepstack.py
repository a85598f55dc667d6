"""Deep-stack vision features as tensors of a fixed shape, so that the decoder that adds them can be captured.

Qwen3-VL and its relatives add features of the vision tower to the image positions behind their first decoder
layers (https://arxiv.org/abs/2406.04334). transformers selects those positions with a boolean mask: the
sizes then depend on the mask's values, the GPU is waited for, and no CUDA graph can hold it. The same sum
over all positions, with zeros where there is no image, has the shape of the hidden states.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vlmtune.compat.transformers import add_deepstack_features_whole, adds_deepstack_features
from vlmtune.model.acceleration import Acceleration


def use_dense_deepstack(decoder: nn.Module) -> Acceleration | None:
    """Make `decoder` add deep-stack features at all positions, in place; None where it adds none."""
    if not adds_deepstack_features(decoder):
        return None
    acceleration = Acceleration(
        "deep-stack features as whole tensors", lambda on: add_deepstack_features_whole(decoder, on)
    )
    acceleration.switch(True)

    def widen(decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return _widen_features(args, kwargs) if acceleration.on else (args, kwargs)

    decoder.register_forward_pre_hook(widen, with_kwargs=True)
    return acceleration


def _widen_features(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Each [image tokens, D] of `deepstack_visual_embeds` becomes [B, T, D], by `visual_pos_masks` [B, T]."""
    features, mask = kwargs.get("deepstack_visual_embeds"), kwargs.get("visual_pos_masks")
    if features is None or mask is None:
        return args, kwargs
    hidden = kwargs["inputs_embeds"]
    empty, places = torch.zeros_like(hidden), mask.unsqueeze(-1).expand_as(hidden)
    widened = [empty.masked_scatter(places, feature.to(hidden.dtype)) for feature in features]
    return args, {**kwargs, "visual_pos_masks": None, "deepstack_visual_embeds": widened}
