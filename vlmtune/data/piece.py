"""`Piece`: one part of the data that any process can read by itself. `Format`: how a kind of data is read."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, cast

from vlmtune.data.dialogues import Dialogue
from vlmtune.data.frames import Frame
from vlmtune.data.image_paths import ImageRules
from vlmtune.data.question_columns import NO_COLUMNS, Columns
from vlmtune.data.records import RawRow
from vlmtune.storage import check_no_special_file, filesystem


@dataclass(frozen=True)
class Piece:
    """One part of the data that any process can read by itself; plain values only.

    `scan.scan` makes pieces. Their fields are part of the prepared store's key: see `source.fingerprint`.

    Attributes:
        format: the name of its format.
        path: absolute path or URI; the name of a hub dataset.
        shown: the name that the user gave, for messages.
        start, stop: bytes of a JSONL file, or rows of a dataset. `start` alone: a row group of Parquet.
        first: the number of its first line (from 1) or row (from 0).
        version: the fingerprint of a dataset, whose path does not show a change.
        dialogues, frames: the part of a frames folder, whose images are in its folder `images`.
        columns: which columns are read as which field, and the question of rows without a dialogue.
        names: the part of an image folder: the paths of its images in `path`; of VQA, the file of answers.
        split: train, eval or test, where the name of its file or Hub split says it.
        dataset_split: the split of a dataset that it is part of; empty if the dataset has none.
        split_column: the column of labels.csv that says each row's split.
        unused: (name, rows) of what nothing uses, where it is known before rows are read.
        notes: what was read in another way than it stands, on the first piece of a file.
    """

    format: str
    path: str
    shown: str
    rules: ImageRules
    group_by: str | None = None
    start: int = 0
    stop: int = 0
    first: int = 0
    version: str = ""
    dialogues: tuple[Dialogue, ...] = ()
    frames: tuple[Frame, ...] = ()
    images: str = "frames"
    columns: Columns = NO_COLUMNS
    names: tuple[str, ...] = ()
    split: str | None = None
    split_column: str | None = None
    dataset_split: str = ""
    unused: tuple[tuple[str, int], ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class PathContents:
    """What lies at a path, as far as a format needs it to recognise its data.

    Attributes:
        whole: all of the data, still to be recognised and cut.
        files, folders: the names in a folder, in alphabetical order, without hidden ones.
        head: the first bytes of a file, some 64 kB; None for a folder.
    """

    whole: Piece
    files: tuple[str, ...] = ()
    folders: tuple[str, ...] = ()
    head: bytes | None = None

    @property
    def suffix(self) -> str:
        """The ending of a file's name, such as ".jsonl"."""
        return suffix(self.whole.shown)


@dataclass(frozen=True)
class Format:
    """One kind of data.

    Attributes:
        name: what pieces and the preflight call it.
        recognises: whether a path holds this kind of data.
        cut: its pieces, in the order of its rows. Raises DataError where the data as a whole cannot be read.
        rows: the rows of a piece, in any process.
    """

    name: str
    recognises: Callable[[PathContents], bool]
    cut: Callable[[PathContents], list[Piece]]
    rows: Callable[[Piece], Iterator[RawRow]]


def open_file(path: str) -> IO[bytes]:
    """A local file or one at a URI, open to read from any place."""
    check_no_special_file(path)
    system, inner = filesystem(path)
    return cast(IO[bytes], system.open_input_file(inner))


def suffix(name: str) -> str:
    """The ending of a file's name in lower case, such as ".jsonl"; "" where it has none."""
    stem, dot, ending = name.partition("?")[0].rpartition(".")
    return f".{ending.lower()}" if dot and stem else ""
