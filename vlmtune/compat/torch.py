"""torch 2.14.1: trees of tensors, and matrix products of 8-bit floats."""

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

Structure = _pytree.TreeSpec


def flatten(tree: Any) -> tuple[list[Any], Structure]:
    """The leaves of nested tuples, lists, dicts and transformers' outputs, and the structure around them.

    Private: `torch.utils._pytree.tree_flatten`. transformers registers its output classes there alone.
    """
    return _pytree.tree_flatten(tree)


def unflatten(leaves: list[Any], structure: Structure) -> Any:
    """The inverse of `flatten`. Private: `torch.utils._pytree.tree_unflatten`."""
    return _pytree.tree_unflatten(leaves, structure)


def scaled_matmul(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor) -> Tensor:
    """`a` [N, D] times `b` [D, O], both float8_e4m3fn, with scales [N, 1] and [1, O]; bfloat16 [N, O].

    Private: `torch._scaled_mm`. `torch.nn.functional.scaled_mm` is the public one since torch 2.10, and was
    not measured yet.
    """
    return torch._scaled_mm(
        a, b, scale_a=scale_a, scale_b=scale_b, out_dtype=torch.bfloat16, use_fast_accum=True
    )
