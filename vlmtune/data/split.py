"""Train, eval and test: which group of rows stands on which side.

Rows that share an image, or a value of the `--group_by` column, form a group, and a group never stands on
two sides. Which side it takes
depends on the seed and the content alone.
"""

import hashlib
from collections import defaultdict
from collections.abc import Sequence

from vlmtune.errors import DataError

TRAIN, EVAL, TEST = "train", "eval", "test"


def connected(keys: Sequence[Sequence[str]]) -> list[str]:
    """The group of each row, named by the least of its keys: rows that share a key, directly or through
    others, are one group."""
    parent: dict[str, str] = {}

    def root(key: str) -> str:
        parent.setdefault(key, key)
        while parent[key] != key:
            parent[key] = parent[parent[key]]
            key = parent[key]
        return key

    for row in keys:
        first = root(row[0])
        for key in row[1:]:
            low, high = sorted((first, root(key)))
            parent[high] = low
            first = low
    return [root(row[0]) for row in keys]


def split(groups: Sequence[str], *, eval_fraction: float, test_fraction: float, seed: int) -> list[str]:
    """The side of each row: groups in the order of a seeded hash fill the test set, then the evaluation set,
    and the rest is trained on.

    Raises:
        DataError: if a side that was asked for, or the training set, would be empty.
    """
    members: dict[str, list[int]] = defaultdict(list)
    for row, group in enumerate(groups):
        members[group].append(row)
    shuffled = sorted(
        members, key=lambda group: hashlib.blake2b(f"{seed}:{group}".encode(), digest_size=16).digest()
    )
    sides = [TRAIN] * len(groups)
    rest = iter(shuffled)
    for side, fraction in ((TEST, test_fraction), (EVAL, eval_fraction)):
        wanted, filled = round(fraction * len(groups)) or int(fraction > 0), 0
        while filled < wanted and (following := next(rest, None)) is not None:
            for row in members[following]:
                sides[row] = side
            filled += len(members[following])
    for part, share in ((TRAIN, 1.0), (EVAL, eval_fraction), (TEST, test_fraction)):
        if share > 0 and part not in sides:
            raise DataError(
                f"{len(groups)} rows in {len(members)} groups of equal images or --group_by values leave no row for {part}: "
                "give more data, or a smaller --eval_fraction or --test_fraction"
            )
    return sides
