"""A piece of a data file, in any understood format → its rows, in any process: `read_piece`."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, Any, cast

import pyarrow as pa
import pyarrow.parquet as pq

from vlmtune.data.columns import readable_columns
from vlmtune.data.dialogues import Dialogue
from vlmtune.data.frames import Frame, frame_rows
from vlmtune.data.hub_datasets import dataset_records, load_splits
from vlmtune.data.image_paths import ImageRules, RowError
from vlmtune.data.jsonfiles import ArrayReader, read_lines
from vlmtune.data.records import RawRow, conversation, group_of
from vlmtune.data.split import TRAIN
from vlmtune.data.splits_given import split_of
from vlmtune.errors import DataError
from vlmtune.storage import filesystem, one_line

ROWS_AT_ONCE = 32  # of Parquet in memory; each may hold encoded images


@dataclass(frozen=True)
class Piece:
    """One part of the data that any process can read by itself; plain values only.

    `scan.scan` makes pieces. Their fields are part of the prepared store's key: see `source.fingerprint`.

    Attributes:
        format: frames, jsonl, json, parquet, saved (a dataset folder) or hub; a key of READERS.
        path: absolute path or URI; the name of a hub dataset.
        shown: the name that the user gave, for messages.
        start, stop: bytes of a JSONL file, or rows of a dataset. `start` alone: a row group of Parquet.
        first: the number of its first line (from 1) or row (from 0).
        version: the fingerprint of a dataset, whose path does not show a change.
        dialogues, frames: the part of a frames folder, whose images are in its folder `images`.
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
    split: str | None = None
    split_column: str | None = None
    dataset_split: str = ""
    unused: tuple[tuple[str, int], ...] = ()
    notes: tuple[str, ...] = ()


def read_piece(piece: Piece) -> Iterator[dict[str, Any]]:
    """The rows of `piece`, one at a time.

    Keys: `source`, `messages`, `images`, `group`, `error`, `kind` (of the error), `split`, and what
    `records.Conversation` tells: `unused`, `notes`, `hints`, `by_name`. A bad row has its reason in `error`,
    and no messages and images. `images` holds absolute paths, URIs or encoded bytes, in the order of the
    image parts of `messages`.

    Raises:
        DataError: the file can no longer be read, as it could when it was scanned.
    """
    try:
        for raw in READERS[piece.format](piece):
            yield _row(raw, piece)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{piece.shown} cannot be read: {one_line(error)}") from error


def open_file(path: str) -> IO[bytes]:
    """A local file or one at a URI, open to read from any place."""
    system, inner = filesystem(path)
    return cast(IO[bytes], system.open_input_file(inner))


def _row(raw: RawRow, piece: Piece) -> dict[str, Any]:
    row: dict[str, Any] = {"source": raw.source, "messages": [], "images": [], "group": None}
    row |= {"error": None, "kind": raw.kind, "split": None}
    row |= {"unused": (), "notes": (), "hints": {}, "by_name": {}}
    try:
        if raw.error is not None:
            raise RowError(raw.error)
        found = conversation(raw.record, piece.rules, (piece.group_by,) if piece.group_by else ())
        group = group_of(raw.group_fields, piece.group_by) if piece.group_by else None
    except RowError as error:
        return {**row, "error": str(error)}
    split = split_of(raw.split) or found.split or piece.split
    return {**row, **vars(found), "group": group, "split": split}


def _read_jsonl(piece: Piece) -> Iterator[RawRow]:
    with open_file(piece.path) as file:
        yield from read_lines(file, piece.shown, piece.start, piece.stop, piece.first)


def _read_json(piece: Piece) -> Iterator[RawRow]:
    with open_file(piece.path) as file:
        yield from ArrayReader(file, piece.shown)


def _read_frames(piece: Piece) -> Iterator[RawRow]:
    return frame_rows(piece.frames, piece.dialogues, piece.images, piece.split_column)


def _read_parquet(piece: Piece) -> Iterator[RawRow]:
    with open_file(piece.path) as file, pq.ParquetFile(file, buffer_size=1 << 20) as table:
        columns = readable_columns(table.schema_arrow, piece.group_by)
        batches = table.iter_batches(
            ROWS_AT_ONCE, row_groups=[piece.start], columns=columns, use_threads=False
        )
        number = piece.first
        for batch in batches:
            for record in batch.to_pylist():
                yield RawRow(f"{piece.shown} row {number}", record, group_fields=record)
                number += 1


def _read_dataset(piece: Piece) -> Iterator[RawRow]:
    data = load_splits(piece.path, piece.shown, from_hub=piece.format == "hub")[0][piece.dataset_split]
    columns = readable_columns(data.features.arrow_schema, piece.group_by)
    for number, record in enumerate(dataset_records(data, piece.start, piece.stop, columns), piece.first):
        place = piece.shown if piece.split in (None, TRAIN) else f"{piece.shown} {piece.dataset_split}"
        yield RawRow(f"{place} row {number}", record, group_fields=record)


READERS: dict[str, Callable[[Piece], Iterator[RawRow]]] = {
    "frames": _read_frames,
    "jsonl": _read_jsonl,
    "json": _read_json,
    "parquet": _read_parquet,
    "saved": _read_dataset,
    "hub": _read_dataset,
}
