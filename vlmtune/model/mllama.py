"""Correct Mllama's cross-attention for batches whose rows have different numbers of images."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.mllama.modeling_mllama import MllamaCrossAttentionDecoderLayer


def mask_padding_images(model: Any) -> None:
    """Mask the padding images added to match the batch's largest image count, in place.

    Models of other families are not changed. transformers skips the cross-attention layers for a batch
    without any image. In a mixed batch it lets rows without an image attend to the features of a blank image.
    The tokens before a row's first image may attend to no image, so they attend to all images evenly, padding
    included. Without this mask, the loss of a row would depend on the other rows of its batch.
    """
    layers = [module for module in model.modules() if isinstance(module, MllamaCrossAttentionDecoderLayer)]
    if layers:
        vision = model.config.vision_config
        columns = vision.max_num_tiles * ((vision.image_size // vision.patch_size) ** 2 + 1)
        for layer in layers:
            layer.register_forward_pre_hook(partial(_mask_padding_columns, columns), with_kwargs=True)
            layer.register_forward_hook(_skip_rows_without_image, with_kwargs=True)


def image_only_modules(model: nn.Module) -> set[str]:
    """The full names of the modules that only rows with an image pass through."""
    return {
        f"{name}.{inner}"
        for name, module in model.named_modules()
        if isinstance(module, MllamaCrossAttentionDecoderLayer)
        for inner, _ in module.named_modules()
    }


def _mask_padding_columns(
    columns: int, module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]
) -> Any:
    """A forward pre-hook of a cross-attention layer, which masks padding images.

    The layer's mask `[B, 1, T, images x columns]` is 0 where a token may attend. For a token that sees no
    image it is 0 everywhere.

    Args:
        columns: the number of columns of an image in the mask.
    """
    mask, sees = kwargs["cross_attention_mask"], kwargs["full_text_row_masked_out_mask"]
    if mask is None or sees is None or mask.shape[-1] == columns:
        return args, kwargs
    attended = ((mask == 0) & sees.bool()).any(dim=2, keepdim=True)
    is_image = attended.unflatten(-1, (-1, columns)).any(-1)  # [B, 1, 1, images]
    padding = ~is_image.repeat_interleave(columns, dim=-1) & ~sees.bool()
    return args, {**kwargs, "cross_attention_mask": mask.masked_fill(padding, torch.finfo(mask.dtype).min)}


def _skip_rows_without_image(
    module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any], output: Tensor
) -> Tensor:
    """A forward hook of a cross-attention layer: for rows without an image, the output is the input.

    `args[0]` and `output` are `[B, T, D]`. The mask `[B, 1, T, 1]` is 0 for tokens that see no image.
    """
    sees = kwargs["full_text_row_masked_out_mask"]
    return output if sees is None else torch.where(sees[:, 0].any(dim=1, keepdim=True), output, args[0])
