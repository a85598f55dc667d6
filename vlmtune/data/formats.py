"""A piece of the data, which any process can read by itself, in any format → its rows: `read_piece`."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vlmtune.data.class_names import class_names, with_class_names
from vlmtune.data.columns import readable_columns
from vlmtune.data.file_formats import FILE_FORMATS, FOLDER_FORMATS
from vlmtune.data.frames import frame_rows
from vlmtune.data.hub_datasets import dataset_records, load_splits
from vlmtune.data.image_paths import RowError
from vlmtune.data.jsonfiles import ArrayReader, read_lines
from vlmtune.data.parquet_limits import bounded_rows, rows_at_once
from vlmtune.data.piece import Piece, open_file
from vlmtune.data.records import Conversation, RawRow, conversation, group_of
from vlmtune.data.row_shapes import as_known_shape
from vlmtune.data.split import TRAIN
from vlmtune.data.splits_given import split_of
from vlmtune.errors import DataError
from vlmtune.storage import one_line


def read_piece(piece: Piece) -> Iterator[dict[str, Any]]:
    """The rows of `piece`, one at a time.

    Keys: `source`, `messages`, `images`, `group`, `error`, `kind` (of the error), `split`, and what
    `records.Conversation` tells: `unused`, `notes`, `hints`, `by_name`, `objects` and `videos`. A bad row has
    its reason in `error`, and no messages and images. `images` holds absolute paths, URIs or encoded bytes,
    in the order of the image parts of `messages`, and `videos` paths or URIs.

    Raises:
        DataError: the file can no longer be read, as it could when it was scanned.
    """
    try:
        for raw in READERS[piece.format](piece):
            yield _row(raw, piece)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{piece.shown} cannot be read: {one_line(error)}") from error


def _row(raw: RawRow, piece: Piece) -> dict[str, Any]:
    row: dict[str, Any] = {"source": raw.source, "messages": [], "images": [], "group": None}
    row |= {"error": None, "kind": raw.error_kind, "split": None}
    row |= {"unused": (), "notes": (), "hints": {}, "by_name": {}, "objects": None}
    row["videos"] = ()
    try:
        if raw.error is not None:
            raise RowError(raw.error)
        found = known_conversation(raw.record, piece)
        group = group_of(raw.group_fields, piece.group_by) if piece.group_by else None
    except RowError as error:
        return {**row, "error": str(error)}
    split = split_of(raw.split) or found.split or piece.split
    return {**row, **vars(found), "group": group, "split": split}


def known_conversation(record: Any, piece: Piece) -> Conversation:
    """A record of `piece`, in any shape, as `records.conversation` gives it.

    Raises:
        RowError: it cannot be trained on.
    """
    note = piece.columns.image_note(record)
    record, own_names = as_known_shape(piece.columns.apply(record))
    try:
        found = conversation(record, piece.rules, (piece.group_by,) if piece.group_by else ())
        return replace(found, notes=(*found.notes, note)) if note else found
    except RowError as error:
        message = str(error)
        for name, own in own_names.items():
            message = message.replace(f"'{name}'", f"'{own}'")
        raise RowError(message) from error


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
        columns = readable_columns(table.schema_arrow, piece.group_by, piece.columns.read)
        names = class_names(table.schema_arrow)
        size = rows_at_once(table, piece.start, columns, piece.shown)
        batches = table.iter_batches(size, row_groups=[piece.start], columns=columns, use_threads=False)
        number = piece.first
        for batch in batches:
            for record, error in bounded_rows(batch):
                if record is not None:
                    record, error = with_class_names(record, names)
                yield RawRow(f"{piece.shown} row {number}", record, group_fields=record, error=error)
                number += 1


def _read_dataset(piece: Piece) -> Iterator[RawRow]:
    data = load_splits(piece.path, piece.shown, from_hub=piece.format == "hub")[0][piece.dataset_split]
    columns = readable_columns(data.features.arrow_schema, piece.group_by, piece.columns.read)
    names = class_names(data.features.arrow_schema)
    for number, record in enumerate(dataset_records(data, piece.start, piece.stop, columns), piece.first):
        record, error = with_class_names(record, names)
        place = piece.shown if piece.split in (None, TRAIN) else f"{piece.shown} {piece.dataset_split}"
        yield RawRow(f"{place} row {number}", record, group_fields=record, error=error)


READERS: dict[str, Callable[[Piece], Iterator[RawRow]]] = {
    "frames": _read_frames,
    "jsonl": _read_jsonl,
    "json": _read_json,
    "parquet": _read_parquet,
    "saved": _read_dataset,
    "hub": _read_dataset,
    **{format.name: format.rows for format in (*FOLDER_FORMATS, *FILE_FORMATS)},
}
