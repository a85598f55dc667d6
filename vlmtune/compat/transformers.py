"""transformers 5.23.0: attention masks without padding, and a layer's gradient checkpointing."""

from collections.abc import Callable
from copy import copy
from functools import partial
from typing import Any

from torch import Tensor
from transformers import AttentionMaskInterface, PreTrainedConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

SUFFIX = "_without_padding"  # behind the name of an attention implementation


def config_without_padding_mask(config: PreTrainedConfig) -> PreTrainedConfig:
    """A copy of a decoder's config under which attention masks are made as before, but never hide padding.

    The mask functions are registered with the documented `AttentionMaskInterface.register`, under names of
    their own. Private: `PreTrainedConfig._attn_implementation`, by which a decoder finds its mask function.
    A decoder cannot be given the mask None for this: it would then look in every step, waiting for the
    device, whether rows hold several packed texts.
    """
    implementation = config._attn_implementation
    if implementation not in ALL_MASK_ATTENTION_FUNCTIONS:
        return config  # it takes no masks
    name = f"{implementation}{SUFFIX}"
    if name not in ALL_MASK_ATTENTION_FUNCTIONS:
        function = partial(_mask_without_padding, ALL_MASK_ATTENTION_FUNCTIONS[implementation])
        AttentionMaskInterface.register(name, function)
    changed = copy(config)
    changed._attn_implementation = name
    return changed


def _mask_without_padding(make: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return make(*args, **{**kwargs, "attention_mask": None})


def run_checkpointed(layer: Any, function: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """`function(*inputs)` with the gradient checkpointing that was enabled for a decoder layer.

    Private: `GradientCheckpointingLayer._gradient_checkpointing_func`, set by
    `gradient_checkpointing_enable` with the user's own arguments. A compiled layer is called past
    `GradientCheckpointingLayer.__call__`.
    """
    output: Tensor = layer._gradient_checkpointing_func(function, *inputs)
    return output
