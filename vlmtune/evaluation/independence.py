"""Whether rows of unlike images can be answered in one batch.

A batch pads images to its largest. Most models mask what is padded. Where one does not, its features of an
image depend on the images beside it, and rows are then answered one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from vlmtune.data.encoded_example import EncodedExample

if TYPE_CHECKING:
    from vlmtune.evaluation.generate import BatchBuilder

# Largest difference of the logits of one row, relative to their norm, that rounding explains.
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 0.2, torch.float16: 0.1}
_independent: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def independent_parts(
    model: Any, builder: BatchBuilder, examples: Sequence[EncodedExample]
) -> list[list[EncodedExample]]:
    """The rows in one part, or each by itself where the model's results would differ.

    That is tried once for each model, with the first rows whose images are padded.
    """
    first = next((one for one in examples if _shapes(one)), None)
    other = next((one for one in examples if first and _shapes(one) and _padded(first, one)), None)
    if first is None or other is None:
        return [list(examples)]
    if model not in _independent:
        _independent[model] = _same_logits(model, builder, [first, other])
    return [list(examples)] if _independent[model] else [[one] for one in examples]


def _shapes(example: EncodedExample) -> dict[str, tuple[int, ...]]:
    """Of the floating-point or uint8 tensors of images."""
    return {
        name: tensor.shape
        for name, tensor in example.tensors.items()
        if name not in example.token_axes and (tensor.dtype == np.uint8 or tensor.dtype.kind == "f")
    }


def _padded(one: EncodedExample, other: EncodedExample) -> bool:
    """Whether a tensor of one of two rows is padded in their batch: axis 0 counts images, patches or rows."""
    shapes, others = _shapes(one), _shapes(other)
    return any(name in others and shape[1:] != others[name][1:] for name, shape in shapes.items())


@torch.no_grad()
def _same_logits(model: Any, builder: BatchBuilder, pair: Sequence[EncodedExample]) -> bool:
    together = _logits(model, builder.batch(model, pair))
    for row, example in enumerate(pair):
        alone = _logits(model, builder.batch(model, [example]))[0]
        ours = together[row, : len(alone)]
        if float((ours - alone).norm() / alone.norm().clamp(min=1e-12)) > TOLERANCES[model.dtype]:
            return False
    return True


def _logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    logits: Tensor = model(**inputs, use_cache=False).logits
    return logits.float()
