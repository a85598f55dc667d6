"""Assign rows to train, eval and test, by the data's own split names, then by groups of rows."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from vlmtune.data.near_duplicates import near_duplicate_groups
from vlmtune.data.source import DataSource, ScannedData
from vlmtune.data.split import EVAL, TEST, TRAIN, connected_groups, describe_largest_group, split
from vlmtune.errors import DataError

NEAR_DUPLICATE_NOTE = (
    "images look nearly like those of other rows; --group_near_duplicates yes keeps such rows together"
)

IndexLine = dict[str, Any]  # the values of one row: see `examples.encode_row` and `store.INDEX`


def assign_splits(source: DataSource, lines: list[IndexLine], scanned: ScannedData) -> str | None:
    """Set `group` and `split` of each good row's line; returns why the rows cannot be trained on, if so."""
    if not lines:
        return f"{', '.join(source.paths)}: no usable row"
    groups, problem = connected_groups([line["group_keys"] for line in lines]), None
    near_duplicate_keys = keys_with_near_duplicates(lines)
    wider_groups = groups if near_duplicate_keys is None else connected_groups(near_duplicate_keys)
    try:
        if source.group_near_duplicates == "yes":
            groups = wider_groups
        splits = _splits(source, lines, groups, scanned)
        if near_duplicate_keys is not None and source.group_near_duplicates == "auto":
            groups, splits = _keep_near_duplicates_together(
                source, lines, scanned, wider_groups, (groups, splits)
            )
    except DataError as error:
        splits, problem = [TRAIN] * len(lines), str(error)
    for line, group, name in zip(lines, groups, splits, strict=True):
        line |= {"group": group, "split": name}
    return problem


def keys_with_near_duplicates(lines: Sequence[IndexLine]) -> list[list[str]] | None:
    """The group keys of rows, with one more key for each image that has a near duplicate.

    Rows with such images get a note.

    Returns:
        None if no image has a near duplicate.
    """
    images = [
        (row, perceptual_hash, image_hash)
        for row, line in enumerate(lines)
        for perceptual_hash, image_hash in zip(line["perceptual_hashes"], line["image_hashes"], strict=True)
    ]
    groups = near_duplicate_groups([perceptual_hash for _, perceptual_hash, _ in images])
    hashes_of: dict[int, set[str]] = defaultdict(set)
    for group, (_, _, image_hash) in zip(groups, images, strict=True):
        hashes_of[group].add(image_hash)
    keys = [list(line["group_keys"]) for line in lines]
    near_duplicates = [
        (row, group) for group, (row, _, _) in zip(groups, images, strict=True) if len(hashes_of[group]) > 1
    ]
    for row, group in near_duplicates:
        keys[row].append(f"near {group}")
        if NEAR_DUPLICATE_NOTE not in lines[row]["reading_notes"]:
            lines[row]["reading_notes"].append(NEAR_DUPLICATE_NOTE)
    return keys if near_duplicates else None


def _keep_near_duplicates_together(
    source: DataSource,
    lines: list[IndexLine],
    scanned: ScannedData,
    wider_groups: list[str],
    otherwise: tuple[list[str], list[str]],
) -> tuple[list[str], list[str]]:
    """The groups and splits with near duplicates together, if each split keeps its number of rows so.

    Args:
        wider_groups: the groups with near duplicates together.
        otherwise: the groups and splits without regard to near duplicates, which are returned if not.
    """
    try:
        splits = _splits(source, lines, wider_groups, scanned)
    except DataError:
        return otherwise
    return (wider_groups, splits) if Counter(splits) == Counter(otherwise[1]) else otherwise


def _splits(source: DataSource, lines: list[IndexLine], groups: list[str], scanned: ScannedData) -> list[str]:
    """The split of each row.

    Rows of `eval_data_path` are evaluation rows. A row whose split is named in the data is in that split,
    unless `given_splits` is "merge". Evaluation and test rows that are still missing are taken from the
    remaining rows.

    Raises:
        DataError: a split would be empty, or a group has training rows and rows that the data names as
            evaluation or test rows.
    """
    first = len(lines) if scanned.first_evaluation_fragment is None else scanned.first_evaluation_fragment
    named_splits = [
        EVAL
        if scanned.evaluation is not None and line["fragment"] >= first
        else (line["given_split"] if source.given_splits == "use" else None)
        for line in lines
    ]
    held_out = {name for name in named_splits if name in (EVAL, TEST)}
    rest = [row for row, name in enumerate(named_splits) if name not in held_out]
    if not rest:
        raise DataError(
            f"{source.data_path}: every row is {' or '.join(sorted(held_out))} data by its file, field or "
            "split, so none is left to train on; --given_splits merge takes them all"
        )
    try:
        rest_splits = split(
            [groups[row] for row in rest],
            eval_fraction=0.0 if EVAL in held_out else source.eval_fraction,
            test_fraction=0.0 if TEST in held_out else source.test_fraction,
            seed=source.seed,
        )
    except DataError as error:
        reason = describe_largest_group(
            [lines[row]["group_keys"] for row in rest], [lines[row]["images"] for row in rest]
        )
        raise DataError(f"{error}: {reason}") from error
    splits = [name or TRAIN for name in named_splits]
    for row, name in zip(rest, rest_splits, strict=True):
        splits[row] = name
    _check_apart(source, lines, groups, splits, rest)
    return splits


def _check_apart(
    source: DataSource, lines: list[IndexLine], groups: list[str], splits: list[str], rest: list[int]
) -> None:
    """Raises DataError if a group has both rows that the data names as evaluation or test rows, and others.

    Args:
        rest: the other rows.
    """
    in_rest = set(rest)
    held_out_row = {groups[row]: row for row in range(len(lines)) if row not in in_rest}  # by group
    shared = next((row for row in rest if groups[row] in held_out_row), None)
    if shared is not None:
        other = lines[held_out_row[groups[shared]]]
        way_out = "remove it from one of them"
        if source.eval_data_path is None:
            way_out += ", or give --given_splits merge to split all rows anew"
        raise DataError(
            f"{lines[shared]['source']}: the same image or group is also in {other['source']}, a row of "
            f"the {splits[held_out_row[groups[shared]]]} data; {way_out}"
        )
