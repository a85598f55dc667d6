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


def use_dense_deepstack(decoder: nn.Module) -> bool:
    """Make `decoder` add deep-stack features at all positions, in place; returns whether it adds any."""
    if not adds_deepstack_features(decoder):
        return False
    add_deepstack_features_whole(decoder)
    decoder.register_forward_pre_hook(_widen_features, with_kwargs=True)
    return True


def _widen_features(decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Each [image tokens, D] of `deepstack_visual_embeds` becomes [B, T, D], by `visual_pos_masks` [B, T]."""
    features, mask = kwargs.get("deepstack_visual_embeds"), kwargs.get("visual_pos_masks")
    if features is None or mask is None:
        return args, kwargs
    hidden = kwargs["inputs_embeds"]
    empty, places = torch.zeros_like(hidden), mask.unsqueeze(-1).expand_as(hidden)
    widened = [empty.masked_scatter(places, feature.to(hidden.dtype)) for feature in features]
    return args, {**kwargs, "visual_pos_masks": None, "deepstack_visual_embeds": widened}
