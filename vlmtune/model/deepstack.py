"""Give DeepStack vision features a fixed shape, so that a decoder that adds them can be captured.

Qwen3-VL and related models add features of the vision tower to the hidden states at image positions after the
first decoder layers (DeepStack, https://arxiv.org/abs/2406.04334). transformers selects these positions with
a boolean mask. The shapes then depend on the mask's values, so Python waits for the GPU, and a CUDA graph
cannot be captured. Here the features are added at all positions, with zeros where there is no image, so
shapes are fixed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vlmtune.compat.transformers import add_deepstack_features_whole, adds_deepstack_features
from vlmtune.model.acceleration import Acceleration


def use_dense_deepstack(decoder: nn.Module) -> Acceleration | None:
    """Make `decoder` add DeepStack features at all positions, in place; None if it adds no such features."""
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
    """Change each [image tokens, D] of `deepstack_visual_embeds` to [B, T, D] with `visual_pos_masks`."""
    features, mask = kwargs.get("deepstack_visual_embeds"), kwargs.get("visual_pos_masks")
    if features is None or mask is None:
        return args, kwargs
    hidden = kwargs["inputs_embeds"]
    empty, places = torch.zeros_like(hidden), mask.unsqueeze(-1).expand_as(hidden)
    widened = [empty.masked_scatter(places, feature.to(hidden.dtype)) for feature in features]
    return args, {**kwargs, "visual_pos_masks": None, "deepstack_visual_embeds": widened}
