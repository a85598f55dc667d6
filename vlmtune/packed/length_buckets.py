"""The few lengths that packed rows are padded to: fewer shapes to compile and capture, little padding."""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass

import numpy as np

MAX_LENGTHS = 8
LENGTH_STEP = 16  # tokens; matrix products over multiples of it are fast
BATCH_TOKENS = (
    512  # what one more packed batch in a round costs: its rows' padding to a bucket, small products
)


@dataclass(frozen=True)
class LengthBuckets:
    """The padded lengths of the rows of a store, in tokens, ascending.

    Rows that a trial cuts to its own `max_length` may be shorter than any row of the store; they are padded
    to `bucket_length`.
    """

    lengths: tuple[int, ...]

    @classmethod
    def of_rows(cls, tokens: np.ndarray, rows_at_once: float = math.inf) -> LengthBuckets:
        """The at most `MAX_LENGTHS` lengths with the least padding for rows of so many tokens, `[rows]`.

        A further length saves padding, and divides the `rows_at_once` of a round into one more packed batch,
        at the cost of `BATCH_TOKENS`.

        By dynamic programming over the distinct lengths: O(n^2) for each bucket, n below a few hundred.
        """
        ends, rows = np.unique(-(-tokens // LENGTH_STEP) * LENGTH_STEP, return_counts=True)
        rows_before = np.concatenate([[0], rows.cumsum()])
        # fewest_tokens[end]: fewest padded tokens of the rows up to ends[end], with the buckets so far.
        fewest_tokens = ends * rows_before[1:]
        buckets = [(int(end),) for end in ends]
        for _ in range(min(MAX_LENGTHS, len(ends)) - 1):
            # The last bucket holds the rows after ends[start]: [end, start], only where start < end.
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
        """The number of tokens that a row of so many is padded to."""
        index = bisect_left(self.lengths, tokens)
        return min([bucket_length(tokens), *self.lengths[index : index + 1]])


def bucket_length(tokens: int) -> int:
    """A multiple of 8 up to 128 tokens, of 128 above 512. From 32 tokens on at most a quarter is padding."""
    step = 8 if tokens <= 128 else 32 if tokens <= 256 else 64 if tokens <= 512 else 128
    return -(-tokens // step) * step
