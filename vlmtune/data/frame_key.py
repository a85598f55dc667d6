"""Finds the column of labels.csv that names the frames: by file names or, failing that, by frame numbers."""

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from vlmtune.data.names import names_image, same_name
from vlmtune.data.tables import Table
from vlmtune.errors import DataError

# Names of that column; if several columns fit, the first name in this order wins.
IMAGE_COLUMNS = ("image", "file", "filename", "file_name", "frame", "path", "id")
# Words in a column's name that suggest that it names images.
IMAGE_WORDS = re.compile(r"image|img|file|frame|path|photo|pic|사진|이미지|파일|프레임", re.IGNORECASE)
INTEGER = re.compile(r"[0-9]{1,18}")


class FrameNames:
    """The frames of a folder, found by name, by name without suffix, and by the last number in the name."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = set(names)
        self._by_key: dict[str | int, list[str]] = defaultdict(list)
        for name in names:
            stem = name.rpartition(".")[0]
            numbers = re.findall(r"[0-9]+", stem.rpartition("/")[2])
            keys: list[str | int] = [same_name(key) for key in _endings(name) + _endings(stem)]
            for key in dict.fromkeys([*keys, *(int(number) for number in numbers[-1:])]):
                self._by_key[key].append(name)

    def __len__(self) -> int:
        return len(self._names)

    def find(self, value: str) -> list[str]:
        """The frames that a cell may mean; several if it is ambiguous."""
        name = value.replace("\\", "/").removeprefix("./").removeprefix("frames/")
        if name in self._names:
            return [name]
        for ending in _endings(name):
            if found := self._by_key.get(same_name(ending)):
                return found
        return self._by_key.get(int(name), []) if INTEGER.fullmatch(name) else []


@dataclass(frozen=True)
class Key:
    """The column that names the frames.

    Attributes:
        frames: for each row, "COLUMN 'VALUE'" for messages, then the frames that it may mean.
        note: a line for people: which column it is, and how many rows have a frame.
    """

    column: str
    frames: list[list[str]]
    note: str


@dataclass(frozen=True)
class _Reading:
    """How a column reads if its values are taken as names or numbers of frames.

    Attributes:
        frames: the frames that each row may mean.
        named: number of rows whose value is a name (not only a number) of exactly one frame.
        numbered: number of rows whose value is the number of exactly one frame.
        files: number of rows whose value ends like the name of an image file.
    """

    column: str
    frames: tuple[tuple[str, ...], ...]
    named: int
    numbered: int
    files: int

    @property
    def different(self) -> int:
        """Number of different frames that rows mean without ambiguity."""
        return len({frames for frames in self.frames if len(frames) == 1})

    @property
    def rank(self) -> tuple[bool, int]:
        """Sort key, best column first: (its name does not suggest images, place in IMAGE_COLUMNS)."""
        lower = self.column.lower()
        known = IMAGE_COLUMNS.index(lower) if lower in IMAGE_COLUMNS[:-1] else len(IMAGE_COLUMNS)
        return not IMAGE_WORDS.search(lower), known


def choose_key(table: Table, names: FrameNames, placeholders: set[str], shown_path: str) -> Key:
    """The column whose values name the frames.

    File names win over numbers. A column that a placeholder uses is a label, unless its name is in
    IMAGE_COLUMNS (and is not `id`).

    Raises:
        DataError: no column names frames, or two columns name different ones.
    """
    rows = [row for _, row in table.rows if len(row) == len(table.columns)]
    columns = [
        (number, column)
        for number, column in enumerate(table.columns)
        if column not in placeholders or column.lower() in IMAGE_COLUMNS[:-1]
    ]
    readings = [_read(column, [row[number] for row in rows], names) for number, column in columns]
    by_name = [reading for reading in readings if _names_files(reading, len(rows))]
    by_number = [reading for reading in readings if _numbers_frames(reading, len(rows), len(names))]
    listed = [reading for reading in readings if reading.column.lower() in IMAGE_COLUMNS]
    candidates = by_name or by_number or listed
    if not candidates:
        raise DataError(
            f"{shown_path} names no image: it needs a column {', '.join(IMAGE_COLUMNS)}; "
            f"it has: {', '.join(table.columns)}"
        )
    best = _agreed(candidates, rows, table.columns, shown_path)
    return _key(best, table, names, "" if by_name else "the number in ")


def _key(best: _Reading, table: Table, names: FrameNames, how: str) -> Key:
    number = table.columns.index(best.column)
    frames = [
        [f"{best.column} {row[number]!r}", *names.find(row[number])] if len(row) > number else [best.column]
        for _, row in table.rows
    ]
    found = sum(len(row) == 2 for row in frames)
    return Key(
        best.column, frames, f"frames matched by {how}column {best.column}: {found} of {len(frames)} rows"
    )


def _read(column: str, values: Sequence[str], names: FrameNames) -> _Reading:
    frames = tuple(tuple(names.find(value)) if value else () for value in values)
    numbers = [INTEGER.fullmatch(value) is not None for value in values]
    one = [len(found) == 1 for found in frames]
    return _Reading(
        column,
        frames,
        named=sum(is_one and not number for is_one, number in zip(one, numbers, strict=True)),
        numbered=sum(is_one and number for is_one, number in zip(one, numbers, strict=True)),
        files=sum(map(names_image, values)),
    )


def _names_files(reading: _Reading, rows: int) -> bool:
    lower = reading.column.lower()
    if 2 * max(reading.named, reading.files) >= rows > 0:
        return True
    return reading.named > 0 and (lower in IMAGE_COLUMNS or IMAGE_WORDS.search(lower) is not None)


def _numbers_frames(reading: _Reading, rows: int, frames: int) -> bool:
    """Whether a column's numbers mean frames: its name says so, or each row has a number of its own."""
    lower = reading.column.lower()
    if lower in IMAGE_COLUMNS or IMAGE_WORDS.search(lower):
        return reading.numbered > 0
    return reading.numbered == reading.different == rows and rows > 1 and 2 * rows >= frames


def _agreed(
    candidates: list[_Reading], rows: list[list[str]], columns: list[str], shown_path: str
) -> _Reading:
    """The best of the columns that could name the frames; the others must not contradict it.

    Raises:
        DataError: two equally likely columns contradict each other.
    """
    most = max(max(reading.named, reading.numbered) for reading in candidates)
    fitting = [reading for reading in candidates if 2 * max(reading.named, reading.numbered) >= most]
    first, *others = sorted(fitting, key=lambda reading: reading.rank)
    for other in others:
        if other.frames == first.frames or other.rank[0] > first.rank[0]:
            continue  # both agree, or only the first one's name has a word for images
        if first.rank[1] < other.rank[1] and first.column.lower() in IMAGE_COLUMNS[:-1]:
            continue  # the first has one of the names that are documented
        row = next(
            number
            for number, (one, two) in enumerate(zip(first.frames, other.frames, strict=True))
            if one != two
        )
        values = dict(zip(columns, rows[row], strict=True))
        raise DataError(
            f"{shown_path}: columns {first.column!r} and {other.column!r} name different frames: with "
            f"{first.column} {values[first.column]!r} the row is {_shown_path(first.frames[row])}, with "
            f"{other.column} {values[other.column]!r} it is {_shown_path(other.frames[row])}; "
            "call the right one 'image'"
        )
    return first


def _shown_path(frames: tuple[str, ...]) -> str:
    return "of no frame" if not frames else f"of {frames[0]}" + (" or others" if frames[1:] else "")


def _endings(path: str) -> list[str]:
    """A path and the paths that it ends in, the longest first."""
    parts = path.split("/")
    return ["/".join(parts[number:]) for number in range(len(parts))]
