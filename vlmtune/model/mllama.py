"""Mllama's cross-attention in a batch of rows with different numbers of pictures: every row computes as it
does alone."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.mllama.modeling_mllama import MllamaCrossAttentionDecoderLayer


def keep_rows_apart(model: Any) -> None:
    """Let no row see the pictures that only pad it to the most of its batch, in place; models of other
    families stay as they are.

    transformers leaves the cross-attention layers out for a batch that has no picture at all. In a mixed
    batch it gives rows without one
    the average of a blank picture's features, and the tokens before a row's first picture, which see none
    and so average over all, that of
    the blank ones beside its own: their loss would depend on their neighbours.
    """
    layers = [module for module in model.modules() if isinstance(module, MllamaCrossAttentionDecoderLayer)]
    if layers:
        vision = model.config.vision_config
        columns = vision.max_num_tiles * ((vision.image_size // vision.patch_size) ** 2 + 1)
        for layer in layers:
            layer.register_forward_pre_hook(partial(_without_blank_pictures, columns), with_kwargs=True)
            layer.register_forward_hook(_unchanged_without_picture, with_kwargs=True)


def _without_blank_pictures(
    columns: int, module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]
) -> Any:
    """The mask `[B, 1, T, pictures x columns]` is 0 where a token may look; it is so everywhere for one that
    sees no picture."""
    mask, sees = kwargs["cross_attention_mask"], kwargs["full_text_row_masked_out_mask"]
    if mask is None or sees is None or mask.shape[-1] == columns:
        return args, kwargs
    looked_at = (
        ((mask == 0) & sees.bool()).any(dim=2, keepdim=True).unflatten(-1, (-1, columns)).any(-1)
    )  # [B, 1, 1, pictures]
    blank = ~looked_at.repeat_interleave(columns, dim=-1) & ~sees.bool()
    return args, {**kwargs, "cross_attention_mask": mask.masked_fill(blank, torch.finfo(mask.dtype).min)}


def pictured_layers(model: nn.Module) -> set[str]:
    """The full names of the modules that only rows with a picture reach."""
    return {
        f"{name}.{inner}"
        for name, module in model.named_modules()
        if isinstance(module, MllamaCrossAttentionDecoderLayer)
        for inner, _ in module.named_modules()
    }


def _unchanged_without_picture(
    module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any], output: Tensor
) -> Tensor:
    """`args[0]` and `output` are `[B, T, D]`; the mask, `[B, 1, T, 1]`, is 0 for tokens that see no
    picture."""
    sees = kwargs["full_text_row_masked_out_mask"]
    return output if sees is None else torch.where(sees[:, 0].any(dim=1, keepdim=True), output, args[0])
