"""`Fragment`: a part of the data files that any process can read alone. `Format`: how one format is read."""

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
class Fragment:
    """A part of the data files that any process can read alone. It holds plain values only.

    `scan.scan` makes fragments. Their fields are part of the prepared store's key: see `source.fingerprint`.

    Attributes:
        format: the name of its `Format`.
        path: absolute path or URI of the file or folder; for a Hub dataset, its name.
        shown_path: the path as the user gave it, without secrets, for messages.
        rules: which images its rows may name.
        group_by: the column of `--group_by`.
        start, stop: the range that it covers: bytes of a JSONL file, or rows of a dataset. For Parquet,
            `start` is the number of a row group, and `stop` is not used.
        first_number: the number of its first line (from 1) or row (from 0), for messages.
        version: fingerprint of a dataset, or state of VQA's answer file: changes that `path` does not show.
        dialogues, frames: for a frames folder, its dialogues and the frames of this fragment.
        images: for a frames folder, the name of the subfolder with the frames.
        columns: which columns are read as which field, and the question of rows without a dialogue.
        files: for class folders, the paths of the images inside `path`; for VQA, the name of the answer file.
        split: train, eval or test, where the name of the file, folder or Hub split says it.
        dataset_split: the dataset's own name of its split; empty if the dataset has no splits.
        split_column: the column of labels.csv that says each row's split.
        unused: (name, number of rows) of columns that nothing uses, as far as known before rows are read.
        reading_notes: values that are read differently from how they are written, such as 3.0 as 3; on the
            first fragment of a file.
    """

    format: str
    path: str
    shown_path: str
    rules: ImageRules
    group_by: str | None = None
    start: int = 0
    stop: int = 0
    first_number: int = 0
    version: str = ""
    dialogues: tuple[Dialogue, ...] = ()
    frames: tuple[Frame, ...] = ()
    images: str = "frames"
    columns: Columns = NO_COLUMNS
    files: tuple[str, ...] = ()
    split: str | None = None
    split_column: str | None = None
    dataset_split: str = ""
    unused: tuple[tuple[str, int], ...] = ()
    reading_notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class PathContents:
    """What lies at a path, as far as a `Format` needs it to recognize its data.

    Attributes:
        whole: one fragment that covers all of the data; `Format.cut` divides it.
        files, folders: the names in a folder, in alphabetical order, without hidden ones.
        head: the first bytes of a file, some 64 kB; None for a folder.
    """

    whole: Fragment
    files: tuple[str, ...] = ()
    folders: tuple[str, ...] = ()
    head: bytes | None = None

    @property
    def suffix(self) -> str:
        """The ending of a file's name, such as ".jsonl"."""
        return suffix(self.whole.shown_path)


@dataclass(frozen=True)
class Format:
    """One data format.

    Attributes:
        name: the format's name in fragments and in the preflight's report.
        recognizes: returns whether a path holds data of this format.
        cut: divides the data into fragments, in the order of its rows. Raises DataError if the data as a
            whole cannot be read.
        rows: reads the rows of a fragment, in any process.
    """

    name: str
    recognizes: Callable[[PathContents], bool]
    cut: Callable[[PathContents], list[Fragment]]
    rows: Callable[[Fragment], Iterator[RawRow]]


def open_file(path: str) -> IO[bytes]:
    """Open a local file, or the file at a URI, for reading with seeks."""
    check_no_special_file(path)
    system, inner = filesystem(path)
    return cast(IO[bytes], system.open_input_file(inner))


def suffix(name: str) -> str:
    """The ending of a file name in lower case, such as ".jsonl"; "" if it has none."""
    stem, dot, ending = name.partition("?")[0].rpartition(".")
    return f".{ending.lower()}" if dot and stem else ""
