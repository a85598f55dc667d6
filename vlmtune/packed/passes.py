"""Rows of many trials → passes through the model: rows of like length together, in few different shapes.

A shape is a number of rows and a number of tokens, both rounded up to a bucket. Recorded steps are for one
shape, and within a shape no
number of a row depends on its neighbours.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vlmtune.data.collate import collate
from vlmtune.data.encoded_example import IGNORED, EncodedExample
from vlmtune.data.store import StoreMeta
from vlmtune.model.transfer import to_device

PIXELS = "pixel_values"
ROWS = (1, 2, 3, 4, 6, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64)


@dataclass(frozen=True)
class PassRow:
    """A row of one trial on its way through the model.

    Attributes:
        owner: whose it is; rows of one owner share `adapter`, float32 `[P]`, and `scaling`.
        number: of the row in the store.
        weight: what its summed loss counts: one over the labelled tokens of its whole step.
        rate, key: share of zeros of LoRA's dropout, and what they follow from.
        dft: its loss is that of Dynamic Fine-Tuning.
    """

    owner: Any
    number: int
    example: EncodedExample
    adapter: Tensor
    scaling: float
    weight: float = 1.0
    rate: float = 0.0
    key: int = 0
    dft: bool = False

    @property
    def pictured(self) -> bool:
        return PIXELS in self.example.tensors


def bucket_length(tokens: int) -> int:
    """To how many tokens a row is padded: steps of 8 for the shortest, of 128 above 512; at most a quarter
    is padding from 32 tokens on."""
    step = 8 if tokens <= 128 else 32 if tokens <= 256 else 64 if tokens <= 512 else 128
    return -(-tokens // step) * step


def bucket_rows(rows: int) -> int:
    """To how many rows a pass is filled up; at most a third of them is filling."""
    return ROWS[bisect_left(ROWS, rows)]


def cut_passes(rows: Sequence[PassRow], tokens: int) -> Iterator[list[PassRow]]:
    """The rows in passes of one bucket of length and at most `tokens` tokens, at least one row each; owners
    stay together."""
    groups: dict[tuple[int, bool], list[PassRow]] = defaultdict(list)
    for row in rows:
        groups[bucket_length(len(row.example.input_ids)), row.pictured].append(row)
    for (length, _), group in sorted(groups.items(), key=lambda item: item[0]):
        most = max(1, min(tokens // length, ROWS[-1]))
        size = ROWS[bisect_left(ROWS, most + 1) - 1]
        for first in range(0, len(group), size):
            yield group[first : first + size]


def filled_up(rows: Sequence[PassRow]) -> list[PassRow]:
    """The rows, and copies of the last one up to a bucket."""
    return [*rows, *[rows[-1]] * (bucket_rows(len(rows)) - len(rows))]


def batch_of(
    rows: Sequence[PassRow], meta: StoreMeta, device: torch.device, dtype: torch.dtype, *, pixels: bool = True
) -> dict[str, Tensor]:
    """The rows as the model takes them, on `device`, filled up to a bucket with rows that have no labels; or
    all but their `pixels`."""
    examples = [row.example for row in rows]
    filled = [row.example for row in filled_up(rows)]
    if not pixels:
        filled = [
            replace(one, tensors={name: tensor for name, tensor in one.tensors.items() if name != PIXELS})
            for one in filled
        ]
    length = bucket_length(max(len(example.input_ids) for example in examples))
    arrays = collate(filled, pad_token_id=meta.pad_token_id, per_row=meta.pixels.per_row, multiple=length)
    arrays["labels"][len(rows) :] = IGNORED
    tensors = {
        name: to_device(torch.from_numpy(array), device) for name, array in arrays.items() if ":" not in name
    }
    return meta.pixels.normalize(tensors, dtype)
