"""Packed batches: rows of several trials that the base computes together, in few shapes.

The shape of a batch is its number of rows, rounded up to one of `ROW_BUCKETS`, and its length in tokens,
rounded up to one of `LengthBuckets`. A CUDA graph is captured for each shape. In batches of one shape, a
row's result does not depend on the other rows. `[P]` is the shape of an adapter as one flat vector: P is the
number of its values, in the order of `layers.AdapterLayout`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vlmtune.data.collate import ITEMS_PER_ROW, collate
from vlmtune.data.encoded_example import IGNORED, EncodedExample
from vlmtune.data.store_meta import StoreMeta
from vlmtune.model.transfer import to_device
from vlmtune.packed.length_buckets import LengthBuckets

PIXELS = "pixel_values"
ROW_BUCKETS = (1, 2, 3, 4, 6, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64)


@dataclass(frozen=True)
class PackedRow:
    """A row of one trial in a packed batch, with the adapter that it uses.

    Attributes:
        slot: the `Slot` of the row's trial; a name for the self-check, which has none. `PackedModel` hands it
            back. All rows of a slot have the same `adapter` and `scaling`.
        number: the row's number among those of all resolutions, see `Store.first_number`.
        adapter: the trial's adapter, float32 `[P]`.
        scaling: LoRA's factor.
        weight: factor of the row's summed loss: one divided by the labelled tokens of the trial's whole step.
        dropout, dropout_key: the rate of LoRA's dropout, and the 32-bit key that decides which values it
            zeroes.
        dft: whether the row's loss is that of Dynamic Fine-Tuning.
    """

    slot: Any
    number: int
    example: EncodedExample
    adapter: Tensor
    scaling: float
    weight: float = 1.0
    dropout: float = 0.0
    dropout_key: int = 0
    dft: bool = False

    @property
    def has_image(self) -> bool:
        # Tensors without an axis of tokens are pixels, image sizes and the like; rows of text have none.
        return any(name not in self.example.token_axes for name in self.example.tensors)

    @property
    def tokens(self) -> int:
        return len(self.example.input_ids)


def bucket_rows(rows: int) -> int:
    """The number of rows that a packed batch of `rows` rows is padded to. Less than a fifth is padding."""
    return ROW_BUCKETS[bisect_left(ROW_BUCKETS, rows)]


def largest_bucket(max_rows: int) -> int:
    """The largest of `ROW_BUCKETS` that is at most `max_rows`, which is at least 1."""
    return ROW_BUCKETS[bisect_left(ROW_BUCKETS, max_rows + 1) - 1]


def rows_per_batch(rows: int, max_rows: int) -> int:
    """The size of a batch if `rows` rows are divided evenly into as few batches of `max_rows` as possible."""
    return -(-rows // -(-rows // max_rows))


def batch_sizes(rows: int, max_rows: int) -> tuple[int, ...]:
    """The numbers of rows that a packed batch may have, largest first. The memory plan chooses one of them.

    Each divides `rows` rows evenly into batches of at most `max_rows` rows.
    """
    max_rows = largest_bucket(max_rows)
    sizes = {bucket_rows(rows_per_batch(rows, size)) for size in ROW_BUCKETS if size <= max_rows}
    return tuple(sorted(sizes, reverse=True))


def second_shape_fraction(rows: int, buckets: LengthBuckets) -> float:
    """Tokens of a batch of the second-largest shape as a fraction of the largest, which has `rows` rows.

    The memory plan leaves room for a CUDA graph of that shape too. The fraction is 1.0 if there are several
    lengths, because batches of another length have about as many tokens. With one length it is the next
    smaller of `ROW_BUCKETS` divided by the bucket of `rows`; with one row, which has no smaller one, 1.0.
    """
    index = bisect_left(ROW_BUCKETS, rows)
    return 1.0 if len(buckets.lengths) > 1 or not index else ROW_BUCKETS[index - 1] / ROW_BUCKETS[index]


def packed_batches(
    rows: Sequence[PackedRow], max_tokens: int, buckets: LengthBuckets
) -> Iterator[list[PackedRow]]:
    """Divide rows into packed batches of at most `max_tokens` tokens, padding included, but at least one row.

    The rows of a batch have one padded length, and all or none of them have an image. Rows are divided evenly
    and keep their order within a group of one length. A slot's rows may be in several batches.
    """
    groups: dict[tuple[int, bool], list[PackedRow]] = defaultdict(list)
    for row in rows:
        groups[buckets(row.tokens), row.has_image].append(row)
    for (length, _), group in sorted(groups.items(), key=lambda item: item[0]):
        max_rows = max(1, min(max_tokens // length, ROW_BUCKETS[-1]))
        size = rows_per_batch(len(group), largest_bucket(max_rows))
        for first in range(0, len(group), size):
            yield group[first : first + size]


def pad_to_bucket(rows: Sequence[PackedRow]) -> list[PackedRow]:
    """The rows, with copies of the last one added up to one of `ROW_BUCKETS`."""
    return [*rows, *[rows[-1]] * (bucket_rows(len(rows)) - len(rows))]


def make_batch(
    rows: Sequence[PackedRow],
    length: int,
    meta: StoreMeta,
    device: torch.device,
    dtype: torch.dtype,
    *,
    pixels: bool = True,
) -> dict[str, Tensor]:
    """The model's inputs for the rows, on `device`, padded to a bucket with rows without labels.

    Args:
        length: the number of tokens that each row is padded to.
        dtype: dtype of the pixels.
        pixels: whether the inputs have pixels; False if cached features replace them.
    """
    examples = [row.example for row in pad_to_bucket(rows)]
    if not pixels:
        examples = [
            replace(one, tensors={name: tensor for name, tensor in one.tensors.items() if name != PIXELS})
            for one in examples
        ]
    # No row is longer than `length`, so `pad_to_multiple_of` pads all to exactly that length.
    arrays = collate(
        examples, pad_token_id=meta.pad_token_id, input_format=meta.input_format, pad_to_multiple_of=length
    )
    arrays["labels"][len(rows) :] = IGNORED
    # The batch is not split again, so it does not need the ITEMS_PER_ROW entries.
    tensors = {
        name: to_device(torch.from_numpy(array), device)
        for name, array in arrays.items()
        if not name.startswith(ITEMS_PER_ROW)
    }
    return meta.input_format.normalize(tensors, dtype)
