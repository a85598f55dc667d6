"""Choose the few lengths that packed rows are padded to: few shapes to capture, little padding."""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass

import numpy as np

MAX_LENGTHS = 8  # lengths of a store
LENGTH_STEP = 16  # tokens; lengths are multiples of it, for fast matrix products
# The cost of one more packed batch in a round, in tokens: padding of its number of rows, smaller matrix
# products.
BATCH_TOKENS = 512


@dataclass(frozen=True)
class LengthBuckets:
    """The padded lengths of a store's rows, in tokens, in ascending order.

    A row that a trial shortens to its `max_length` is padded to `bucket_length` if that is less.
    """

    lengths: tuple[int, ...]

    @classmethod
    def of_rows(cls, tokens: np.ndarray, rows_at_once: float = math.inf) -> LengthBuckets:
        """At most `MAX_LENGTHS` lengths with the least padding for rows of `tokens` `[rows]` tokens.

        One more length saves padding, but makes one more packed batch in a round of `rows_at_once` rows,
        which costs `BATCH_TOKENS`. Lengths are added while that pays.

        Dynamic programming over the n distinct lengths: O(n^2) for each bucket; n is below a few hundred.
        """
        ends, rows = np.unique(-(-tokens // LENGTH_STEP) * LENGTH_STEP, return_counts=True)
        rows_before = np.concatenate([[0], rows.cumsum()])
        # fewest_tokens[end]: the least number of padded tokens of the rows up to ends[end], with the buckets
        # so far.
        fewest_tokens = ends * rows_before[1:]
        buckets = [(int(end),) for end in ends]
        for _ in range(min(MAX_LENGTHS, len(ends)) - 1):
            # padded[end, start]: the last bucket has the rows after ends[start]. Only start < end is
            # possible.
            padded = fewest_tokens[None] + ends[:, None] * (rows_before[1:, None] - rows_before[None, 1:])
            padded = np.where(np.tri(len(ends), k=-1, dtype=bool), padded, np.iinfo(np.int64).max)
            best = padded.argmin(1)
            saved = fewest_tokens[-1] - padded[-1, best[-1]]
            if saved / len(tokens) * rows_at_once <= BATCH_TOKENS:
                break
            better = padded[np.arange(len(ends)), best] < fewest_tokens
            buckets = [
                (*buckets[best[end]], int(ends[end])) if better[end] else buckets[end]
                for end in range(len(ends))
            ]
            fewest_tokens = np.where(better, padded[np.arange(len(ends)), best], fewest_tokens)
        return cls(buckets[-1])

    def __call__(self, tokens: int) -> int:
        """The length that a row of `tokens` tokens is padded to."""
        index = bisect_left(self.lengths, tokens)
        return min([bucket_length(tokens), *self.lengths[index : index + 1]])


def bucket_length(tokens: int) -> int:
    """`tokens` rounded up to a multiple of 8 to 128. From 32 tokens on, at most a quarter is padding."""
    step = 8 if tokens <= 128 else 32 if tokens <= 256 else 64 if tokens <= 512 else 128
    return -(-tokens // step) * step
