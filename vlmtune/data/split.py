"""Train, eval and test: which group of rows is in which split.

Rows that share an image, or a value of the `--group_by` column, form a group. All rows of a group are in the
same split, which depends only on the seed and the content.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence

from vlmtune.errors import DataError

NO_EVAL_ROWS = "--eval_fraction 0 leaves no row to evaluate on: give a share of the data, or --eval_data_path"
TRAIN, EVAL, TEST = "train", "eval", "test"
GROUP = "group "  # prefix of the key of a --group_by value
MIN_ROWS = 3  # one for each split


def connected_groups(keys: Sequence[Sequence[str]]) -> list[str]:
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

    Groups are ordered by a seeded hash. The first ones fill the test set, the next ones the evaluation set,
    and the rest is trained on.

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
            count = f"{len(members)} group{'' if len(members) == 1 else 's'}"
            raise DataError(
                f"{len(groups)} rows in {count} of equal images or --group_by values leave no row for {name}"
            )
    return splits


def describe_largest_group(keys: Sequence[Sequence[str]], images: Sequence[Sequence[str]]) -> str:
    """Why the groups leave a split empty, and what to do about it.

    Args:
        keys: the keys of each row, as for `connected_groups`: first a hash of each image, in their order, and
            of each video (of the question if there is neither), then its --group_by value.
        images: paths of each row's images.
    """
    if len(keys) < MIN_ROWS:
        return (
            "three rows about different images are the least for train, eval and test; with "
            "--test_fraction 0 and --eval_data_path, one is enough"
        )
    rows_with: dict[str, list[int]] = defaultdict(list)  # by key
    for row, row_keys in enumerate(keys):
        for key in dict.fromkeys(row_keys):
            rows_with[key].append(row)
    key = max(rows_with, key=lambda name: len(rows_with[name]))
    first = rows_with[key][0]
    largest = max(Counter(connected_groups(keys)).values())
    way_out = "give --eval_data_path (with --test_fraction 0), or rows that share less"
    if len(rows_with[key]) == 1:
        return (
            "no two rows share an image, a question or a --group_by value, so there are too few rows for "
            "these fractions; give more rows, or --eval_data_path (with --test_fraction 0)"
        )
    if key.startswith(GROUP):
        reason = f"the --group_by value {key.removeprefix(GROUP)!r} is in {len(rows_with[key])} rows"
    elif images[first]:
        # A video's key comes after those of the images: the last image stands for it.
        image = images[first][min(list(keys[first]).index(key), len(images[first]) - 1)]
        reason = f"they share images, such as {image} in {len(rows_with[key])} rows"
    elif any(images):
        reason = "they share images"
    else:
        reason = f"{len(rows_with[key])} rows ask the same"
    return f"{largest} rows stay together, because {reason}; {way_out}"
