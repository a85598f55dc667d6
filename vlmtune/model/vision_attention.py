"""Compute attention for all images of a batch in one call, in vision towers that concatenate patches.

Such towers (Qwen-VL, GLM-V and others) have chunks of patches, an image or a window of an image each, with
boundaries as cumulative lengths. Without flash-attention, transformers calls the kernel once for each chunk:
an image of 640x480 pixels has 30 windows, in each of 32 layers. torch has a kernel for all chunks too:
`torch.nn.attention.varlen`.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from vlmtune.compat.transformers import attention_implementation
from vlmtune.model.acceleration import Acceleration

# transformers passes the chunks' boundaries to each implementation whose name contains "flash".
NAME = "flash_by_torch"
HALF_TYPES = (torch.bfloat16, torch.float16)  # dtypes that the kernel supports


def attend_in_chunks(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention within each chunk, with the signature of transformers' attention functions.

    Args:
        query, key, value: [1, heads, patches, width of a head]; key and value may have fewer heads.
        cu_seq_lens_q: [chunks + 1], the first patch of each chunk and the number of patches.

    Returns:
        The output [1, patches, heads, width of a head], and None in place of attention weights.
    """
    if (shared := query.shape[1] // key.shape[1]) > 1:  # groups of queries share their keys
        key, value = (part.repeat_interleave(shared, dim=1) for part in (key, value))
    if cu_seq_lens_q is None:  # a layer without chunks
        whole = nn.functional.scaled_dot_product_attention(
            query, key, value, attention_mask, dropout_p=dropout, scale=scaling
        )
        return whole.transpose(1, 2).contiguous(), None
    if query.is_cuda and query.dtype in HALF_TYPES and not dropout and max_length_q is not None:
        from torch.nn.attention.varlen import varlen_attn

        q, k, v = (part[0].transpose(0, 1).contiguous() for part in (query, key, value))
        if scaling is not None:  # the kernel always scales by 1 / sqrt(width of a head)
            q = q * (scaling * query.shape[-1] ** 0.5)
        bounds = cu_seq_lens_q.to(query.device, torch.int32)
        out: Any = varlen_attn(q, k, v, bounds, bounds, max_length_q, max_length_q)
        return out.unsqueeze(0), None
    sizes = (cu_seq_lens_q[1:] - cu_seq_lens_q[:-1]).tolist()
    chunks = zip(*(part.split(sizes, dim=2) for part in (query, key, value)), strict=True)
    outs = [
        nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scaling)
        for q, k, v in chunks
    ]
    return torch.cat(outs, dim=2).transpose(1, 2).contiguous(), None


def use_varlen_attention(model: PreTrainedModel) -> Acceleration | None:
    """Make the vision tower compute attention for all chunks in one call, in place.

    Returns:
        None if the tower does not take such attention, see `takes_varlen_attention`.
    """
    if not takes_varlen_attention(model):
        return None
    AttentionInterface.register(NAME, attend_in_chunks)

    def apply(on: bool) -> None:
        model.set_attn_implementation({"vision_config": NAME if on else "sdpa"})

    apply(True)
    return Acceleration("attention of the vision tower in one call", apply)


def takes_varlen_attention(model: PreTrainedModel) -> bool:
    """Whether a vision tower's layers take the boundaries of chunks, and use torch's kernel by default."""
    vision = getattr(model.config, "vision_config", None)
    if vision is None or attention_implementation(vision) != "sdpa":
        return False
    return any(_takes_chunks(module) for module in model.modules())


def _takes_chunks(module: nn.Module) -> bool:
    return "cu_seqlens" in inspect.signature(type(module).forward).parameters
