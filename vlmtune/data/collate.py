"""Examples → one padded batch, and a batch → parts of fewer rows.

A processor that is called on a whole batch pads ids, tiles and masks in its own way. `collate` gives the
same tensors from rows that were processed one by one, so rows are prepared once and mixed in any batch.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from vlmtune.data.encoded_example import IGNORED, EncodedExample
from vlmtune.data.input_format import ROWS, TOKENS, InputFormat, TensorLayout

# Key of a batch entry, shape `[B]`: how many items of a tensor belong to each row, for tensors in which the
# items of all rows are concatenated. After this prefix come the axis and the tensor's name, such as
# `items_per_row:0:pixel_values`.
ITEMS_PER_ROW = "items_per_row:"


def collate(
    examples: Sequence[EncodedExample],
    *,
    pad_token_id: int,
    input_format: InputFormat,
    filler: bool = False,
    pad_to_multiple_of: int = 1,
) -> dict[str, np.ndarray]:
    """Stack examples into one batch, padded on the right.

    Args:
        input_format: how the rows' tensors are joined.
        filler: the rows are there only so that this rank takes part in a step; no token gets a label.
        pad_to_multiple_of: tokens; the padded length is a multiple of it.

    Returns:
        `input_ids`, `attention_mask`, `labels` of shape `[B, T]` int64, the model's other tensors, and
        `ITEMS_PER_ROW` entries for tensors whose first dimension is not the row. `split_batch` removes these
        entries.
    """
    length = (
        -(-max(len(example.input_ids) for example in examples) // pad_to_multiple_of) * pad_to_multiple_of
    )
    batch = {
        "input_ids": _stack([example.input_ids for example in examples], length, pad_token_id),
        "attention_mask": _stack([np.ones(len(example.input_ids)) for example in examples], length, 0),
        "labels": _stack([example.labels for example in examples], length, IGNORED),
    }
    if filler:
        batch["labels"][:] = IGNORED
    for name in sorted({name for example in examples for name in example.tensors}):
        tensors = [example.tensors.get(name) for example in examples]
        axis = next((example.token_axes[name] for example in examples if name in example.token_axes), None)
        layout = (
            input_format.layouts.get(name, TensorLayout(ROWS)) if axis is None else TensorLayout(TOKENS, axis)
        )
        if layout.kind == TOKENS:
            padded = [_lengthen(tensor, layout.axis, length) for tensor in _with_blanks(tensors)]
            batch[name] = _concatenate(padded, axis=layout.axis - 1)
            if layout.axis > 1:  # as multimodal positions [3, B, T]
                batch[f"{ITEMS_PER_ROW}{layout.axis - 1}:{name}"] = np.ones(len(examples), dtype=np.int64)
        elif layout.kind == ROWS:
            batch[name] = _concatenate(_with_blanks(tensors), axis=0)
        else:
            present = [tensor for tensor in tensors if tensor is not None]
            batch[name] = _concatenate(present, axis=layout.axis)
            counts = [0 if tensor is None else tensor.shape[layout.axis] for tensor in tensors]
            batch[f"{ITEMS_PER_ROW}{layout.axis}:{name}"] = np.array(counts, dtype=np.int64)
    if "aspect_ratio_mask" in batch:
        # Mllama's processor does the same: the model's attention needs a tile even for a row without an
        # image.
        batch["aspect_ratio_mask"][..., 0] = 1
    return batch


def split_batch(batch: dict[str, torch.Tensor], size: int) -> Iterator[dict[str, torch.Tensor]]:
    """The batch in the form that the model takes, in parts of at most `size` rows."""
    cuts: dict[str, tuple[int, list[int]]] = {}
    for key, counts in batch.items():
        if key.startswith(ITEMS_PER_ROW):
            number, name = key.removeprefix(ITEMS_PER_ROW).split(":", 1)
            cuts[name] = (int(number), [0, *counts.cumsum(0).tolist()])
    rows = len(batch["input_ids"])
    for first in range(0, rows, size):
        last = min(first + size, rows)
        part = {}
        for name, tensor in batch.items():
            if name.startswith(ITEMS_PER_ROW):
                continue
            if name in cuts:
                axis, ends = cuts[name]
                if ends[last] > ends[first]:  # rows without an image have no image tensors
                    part[name] = tensor.narrow(axis, ends[first], ends[last] - ends[first])
            else:
                part[name] = tensor[first:last]
        yield part


def _stack(rows: list[np.ndarray], length: int, fill: int) -> np.ndarray:
    out = np.full((len(rows), length), fill, dtype=np.int64)
    for index, row in enumerate(rows):
        out[index, : len(row)] = row
    return out


def _with_blanks(tensors: list[np.ndarray | None]) -> list[np.ndarray]:
    """The tensors, with an empty one (one row, no image) for each text-only row, which has none."""
    shape, dtype = next((tensor.shape, tensor.dtype) for tensor in tensors if tensor is not None)
    blank = np.zeros((1, *([0] * (len(shape) - 1))), dtype=dtype)
    return [blank if tensor is None else tensor for tensor in tensors]


def _lengthen(tensor: np.ndarray, axis: int, length: int) -> np.ndarray:
    """Pad the axis of the tokens with zeros up to `length`."""
    gaps = [(0, 0)] * tensor.ndim
    gaps[axis] = (0, length - tensor.shape[axis])
    return np.pad(tensor, gaps)


def _concatenate(tensors: list[np.ndarray], axis: int) -> np.ndarray:
    """Join along an axis, after padding all other axes with zeros to the largest size."""
    largest = np.max([tensor.shape for tensor in tensors], axis=0)
    padded = []
    for tensor in tensors:
        missing = largest - tensor.shape
        missing[axis] = 0
        padded.append(np.pad(tensor, [(0, after) for after in missing]) if missing.any() else tensor)
    return np.concatenate(padded, axis=axis)
