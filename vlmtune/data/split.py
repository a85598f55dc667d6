"""Train, eval and test: which group of rows is in which split.

Rows that share an image, or a value of the `--group_by` column, form a group, and a group is never in two
splits. Its split depends on the seed and the content alone.
"""

import hashlib
from collections import defaultdict
from collections.abc import Sequence

from vlmtune.errors import DataError

TRAIN, EVAL, TEST = "train", "eval", "test"


def connected(keys: Sequence[Sequence[str]]) -> list[str]:
    """The group of each row: rows that share a key, directly or through other rows, are one group.

    A group is named by the first of its keys in alphabetical order.
    """
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
    """The split of each row.

    Groups, in the order of a seeded hash, fill the test set, then the evaluation set. The rest is trained on.

    Raises:
        DataError: a split that was asked for, or the training set, would be empty.
    """
    members: dict[str, list[int]] = defaultdict(list)
    for row, group in enumerate(groups):
        members[group].append(row)
    shuffled = sorted(
        members, key=lambda group: hashlib.blake2b(f"{seed}:{group}".encode(), digest_size=16).digest()
    )
    splits = [TRAIN] * len(groups)
    rest = iter(shuffled)
    for name, fraction in ((TEST, test_fraction), (EVAL, eval_fraction)):
        wanted, filled = round(fraction * len(groups)) or int(fraction > 0), 0
        while filled < wanted and (next_group := next(rest, None)) is not None:
            for row in members[next_group]:
                splits[row] = name
            filled += len(members[next_group])
    for name, fraction in ((TRAIN, 1.0), (EVAL, eval_fraction), (TEST, test_fraction)):
        if fraction > 0 and name not in splits:
            raise DataError(
                f"{len(groups)} rows in {len(members)} groups of equal images or --group_by values "
                f"leave no row for {name}: "
                "give more data, or a smaller --eval_fraction or --test_fraction"
            )
    return splits
