"""Whether rows with images of different sizes can be answered in one batch.

In a batch, images are padded to the largest one. Most models mask the padding. If a model does not, its
features of an image depend on the other images in the batch, so its rows are answered one by one.
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

# Largest difference of the logits of one row, relative to their norm, that rounding alone can cause.
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 0.2, torch.float16: 0.1}
_independent: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def independent_parts(
    model: Any, builder: BatchBuilder, examples: Sequence[EncodedExample]
) -> list[list[EncodedExample]]:
    """All rows in one part, or each row in a part of its own if the model's results would differ otherwise.

    That is tried once for each model, on the first two rows whose images need padding.
    """
    first = next((one for one in examples if _shapes(one)), None)
    other = next((one for one in examples if first and _shapes(one) and _padded(first, one)), None)
    if first is None or other is None:
        return [list(examples)]
    if model not in _independent:
        _independent[model] = _same_logits(model, builder, [first, other])
    return [list(examples)] if _independent[model] else [[one] for one in examples]


def _shapes(example: EncodedExample) -> dict[str, tuple[int, ...]]:
    """The shapes of the floating-point and uint8 tensors of images, by name."""
    return {
        name: tensor.shape
        for name, tensor in example.tensors.items()
        if name not in example.token_axes and (tensor.dtype == np.uint8 or tensor.dtype.kind == "f")
    }


def _padded(one: EncodedExample, other: EncodedExample) -> bool:
    """Whether a batch of two rows pads one of their tensors, on an axis other than 0 (images or patches)."""
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
