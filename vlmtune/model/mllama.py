"""Mllama's cross-attention in a batch of rows with and without pictures: every row computes as it does alone."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.mllama.modeling_mllama import MllamaCrossAttentionDecoderLayer


def skip_rows_without_pictures(model: nn.Module) -> None:
    """Let rows without a picture pass the cross-attention layers unchanged, in place; models of other families stay as they are.

    transformers leaves these layers out for a batch that has no picture at all. In a mixed batch it gives the other rows the average of a
    blank picture's features, so that their loss would depend on their neighbours.
    """
    for module in model.modules():
        if isinstance(module, MllamaCrossAttentionDecoderLayer):
            module.register_forward_hook(_unchanged_without_picture, with_kwargs=True)


def pictured_layers(model: nn.Module) -> set[str]:
    """The full names of the modules that only rows with a picture reach."""
    return {
        f"{name}.{inner}"
        for name, module in model.named_modules()
        if isinstance(module, MllamaCrossAttentionDecoderLayer)
        for inner, _ in module.named_modules()
    }


def _unchanged_without_picture(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
    """`args[0]` and `output` are `[B, T, D]`; the mask, `[B, 1, T, 1]`, is 0 for tokens that see no picture."""
    sees = kwargs["full_text_row_masked_out_mask"]
    return output if sees is None else torch.where(sees[:, 0].any(dim=1, keepdim=True), output, args[0])
