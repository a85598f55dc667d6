"""transformers 5.23.0: attention implementations and masks, deep-stack features, gradient checkpointing."""

from collections.abc import Callable
from copy import copy
from functools import partial
from typing import Any

from torch import Tensor
from transformers import AttentionMaskInterface, PreTrainedConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

SUFFIX = "_without_padding"  # appended to the name of an attention implementation


def attention_implementation(config: PreTrainedConfig) -> str:
    """The name of the attention function that a part of a model uses, such as "sdpa".

    Private: `PreTrainedConfig._attn_implementation`.
    """
    name: str = config._attn_implementation
    return name


def config_without_padding_mask(config: PreTrainedConfig) -> PreTrainedConfig:
    """A copy of a decoder's config under which attention masks are made as before, but never hide padding.

    The mask functions are registered with the documented `AttentionMaskInterface.register`, under names of
    their own. Private: `PreTrainedConfig._attn_implementation`, by which a decoder finds its mask function.
    Passing the mask None to a decoder would not do: it would then check in every step whether rows hold
    several packed texts, which waits for the GPU.
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
    `gradient_checkpointing_enable` with the user's own arguments. It is needed because a compiled layer is
    called without `GradientCheckpointingLayer.__call__`.
    """
    output: Tensor = layer._gradient_checkpointing_func(function, *inputs)
    return output


def adds_deepstack_features(decoder: Any) -> bool:
    """Whether a decoder adds deep-stack vision features. Private: `_deepstack_process` of its class."""
    return "_deepstack_process" in vars(type(decoder))


def add_deepstack_features_whole(decoder: Any, on: bool = True) -> None:
    """Make a decoder add deep-stack features that have the shape of its hidden states; undo that if not `on`.

    Private: `_deepstack_process(hidden_states, visual_pos_masks, visual_embeds)`, which returns the sum.
    """
    if on:
        decoder._deepstack_process = _add_whole
    else:
        vars(decoder).pop("_deepstack_process", None)


def _add_whole(hidden_states: Tensor, visual_pos_masks: None, visual_embeds: Tensor) -> Tensor:
    return hidden_states + visual_embeds
