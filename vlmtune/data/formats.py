"""Read the rows of a fragment of the data, in any format: `read_fragment`."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vlmtune.data.class_names import class_names, with_class_names
from vlmtune.data.columns import readable_columns
from vlmtune.data.file_formats import FILE_FORMATS, FOLDER_FORMATS
from vlmtune.data.fragment import Fragment, open_file
from vlmtune.data.frames import frame_rows
from vlmtune.data.hub_datasets import dataset_records, load_splits
from vlmtune.data.image_paths import RowError
from vlmtune.data.jsonfiles import ArrayReader, read_lines
from vlmtune.data.parquet_limits import bounded_rows, rows_at_once
from vlmtune.data.records import Conversation, RawRow, conversation, group_of
from vlmtune.data.row_shapes import as_known_shape
from vlmtune.data.split import TRAIN
from vlmtune.data.splits_given import split_of
from vlmtune.errors import DataError
from vlmtune.storage import one_line


def read_fragment(fragment: Fragment) -> Iterator[dict[str, Any]]:
    """Yield the rows of `fragment`, each as a dict.

    The keys are `source`, `group`, `error`, `error_kind`, and the fields of `records.Conversation`. The
    `error` of a bad row is the reason, and its messages and images are empty. `images` holds absolute paths,
    URIs or encoded bytes, in the order of the image parts of `messages`; `videos` holds paths or URIs.

    Raises:
        DataError: the file cannot be read, although it could be when it was scanned.
    """
    try:
        for raw in READERS[fragment.format](fragment):
            yield _row(raw, fragment)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{fragment.shown_path} cannot be read: {one_line(error)}") from error


def _row(raw: RawRow, fragment: Fragment) -> dict[str, Any]:
    row: dict[str, Any] = {"source": raw.source, "messages": [], "images": [], "group": None}
    row |= {"error": None, "error_kind": raw.error_kind, "split": None}
    row |= {"unused": (), "reading_notes": (), "hints": {}, "found_by_name": {}, "objects": None}
    row["videos"] = ()
    try:
        if raw.error is not None:
            raise RowError(raw.error)
        found = known_conversation(raw.record, fragment)
        group = group_of(raw.group_fields, fragment.group_by) if fragment.group_by else None
    except RowError as error:
        return {**row, "error": str(error)}
    split = split_of(raw.split) or found.split or fragment.split
    return {**row, **vars(found), "group": group, "split": split}


def known_conversation(record: Any, fragment: Fragment) -> Conversation:
    """Turn a record of `fragment`, in any known shape, into a `Conversation`.

    Raises:
        RowError: it cannot be trained on.
    """
    note = fragment.columns.image_note(record)
    record, own_names = as_known_shape(fragment.columns.apply(record))
    try:
        found = conversation(record, fragment.rules, (fragment.group_by,) if fragment.group_by else ())
        return replace(found, reading_notes=(*found.reading_notes, note)) if note else found
    except RowError as error:
        message = str(error)
        for name, own in own_names.items():
            message = message.replace(f"'{name}'", f"'{own}'")
        raise RowError(message) from error


def _read_jsonl(fragment: Fragment) -> Iterator[RawRow]:
    with open_file(fragment.path) as file:
        yield from read_lines(file, fragment.shown_path, fragment.start, fragment.stop, fragment.first_number)


def _read_json(fragment: Fragment) -> Iterator[RawRow]:
    with open_file(fragment.path) as file:
        yield from ArrayReader(file, fragment.shown_path)


def _read_frames(fragment: Fragment) -> Iterator[RawRow]:
    return frame_rows(fragment.frames, fragment.dialogues, fragment.images, fragment.split_column)


def _read_parquet(fragment: Fragment) -> Iterator[RawRow]:
    with open_file(fragment.path) as file, pq.ParquetFile(file, buffer_size=1 << 20) as table:
        columns = readable_columns(table.schema_arrow, fragment.group_by, fragment.columns.read)
        names = class_names(table.schema_arrow)
        size = rows_at_once(table, fragment.start, columns, fragment.shown_path)
        batches = table.iter_batches(size, row_groups=[fragment.start], columns=columns, use_threads=False)
        number = fragment.first_number
        for batch in batches:
            for record, error in bounded_rows(batch):
                if record is not None:
                    record, error = with_class_names(record, names)
                yield RawRow(f"{fragment.shown_path} row {number}", record, group_fields=record, error=error)
                number += 1


def _read_dataset(fragment: Fragment) -> Iterator[RawRow]:
    data = load_splits(fragment.path, fragment.shown_path, from_hub=fragment.format == "hub")[0][
        fragment.dataset_split
    ]
    columns = readable_columns(data.features.arrow_schema, fragment.group_by, fragment.columns.read)
    names = class_names(data.features.arrow_schema)
    for number, record in enumerate(
        dataset_records(data, fragment.start, fragment.stop, columns), fragment.first_number
    ):
        record, error = with_class_names(record, names)
        place = (
            fragment.shown_path
            if fragment.split in (None, TRAIN)
            else f"{fragment.shown_path} {fragment.dataset_split}"
        )
        yield RawRow(f"{place} row {number}", record, group_fields=record, error=error)


READERS: dict[str, Callable[[Fragment], Iterator[RawRow]]] = {
    "frames": _read_frames,
    "jsonl": _read_jsonl,
    "json": _read_json,
    "parquet": _read_parquet,
    "saved": _read_dataset,
    "hub": _read_dataset,
    **{format.name: format.rows for format in (*FOLDER_FORMATS, *FILE_FORMATS)},
}
