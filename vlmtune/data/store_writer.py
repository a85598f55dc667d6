"""Writes a prepared store: shards of rows, then the index and other lists, and meta.json last."""

import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.numpy import save as save_tensors

from vlmtune.data.encoded_example import EncodedExample
from vlmtune.data.facts import FACTS
from vlmtune.data.store import BAD_ROWS, IMAGES, INDEX, ROWS, record_columns
from vlmtune.data.store_meta import StoreMeta
from vlmtune.shown_text import redacted
from vlmtune.storage import file_states, filesystem, scheme

# Size of a row group, which one random read fetches: a few LLaVA images (0.34 MB each) or thousands of text
# rows.
ROW_GROUP_BYTES = 1 << 20


def write_shard(path: str, content: Sequence[EncodedExample | dict[str, Any]]) -> list[tuple[int, int]]:
    """Write examples, or raw rows, as one Parquet file.

    Returns:
        (row group, offset in the group) of each row.
    """
    fs, inner = filesystem(path)
    places: list[tuple[int, int]] = []
    options = {
        "compression": "lz4",
        "use_dictionary": False,
        "write_statistics": False,
        "write_page_checksum": True,
    }
    with fs.open_output_stream(inner) as stream, pq.ParquetWriter(stream, ROWS, **options) as writer:
        for group, rows in enumerate(_row_groups(content)):
            writer.write_table(pa.Table.from_pylist(rows, schema=ROWS))
            places += [(group, offset) for offset in range(len(rows))]
    return places


def finish_store(
    folder: str, good: Sequence[dict[str, Any]], bad: Sequence[dict[str, Any]], meta: StoreMeta
) -> None:
    """Write everything but the shards.

    Args:
        good: index lines of the rows in the shards, with their `group` and `split`.
        bad: index lines of the rows that were left out.
    """
    fs, inner = filesystem(folder)
    with fs.open_output_stream(f"{inner}/{BAD_ROWS}") as stream:
        for line in bad:
            reason = {"source": line["source"], "reason": line["error"], "kind": line["error_kind"]}
            stream.write((json.dumps(reason, ensure_ascii=False) + "\n").encode())
    images = _image_states(good, bad)
    for name, rows, schema in (("images", images, IMAGES), ("facts", good, FACTS), ("index", good, INDEX)):
        table = pa.Table.from_pylist(list(rows), schema=schema)
        pq.write_table(table, f"{inner}/{name}.parquet", filesystem=fs)
    with fs.open_output_stream(f"{inner}/meta.json") as stream:
        stream.write(json.dumps(meta.to_dict(), indent=2).encode())


def _image_states(good: Sequence[dict[str, Any]], bad: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    paths = sorted({path for line in (*good, *bad) for path in line["images"]})
    states = [{"path": redacted(path), "state": state} for path, state in file_states(paths)]
    # A failed download may work the next time. `Store.images_unchanged` is never true for this state.
    states += [
        {"path": redacted(path), "state": "not there"}
        for line in bad
        for path in line["images"]
        if scheme(path) in ("http", "https")
    ]
    return states


def _row_groups(content: Iterable[EncodedExample | dict[str, Any]]) -> Iterable[list[dict[str, Any]]]:
    rows: list[dict[str, Any]] = []
    size = 0
    for row in content:
        columns = record_columns(row) if isinstance(row, dict) else _columns(row)
        rows.append(columns)
        size += sum(len(value) for name, value in columns.items() if name != "files" and value is not None)
        size += sum(map(len, columns.get("files", ())))
        if size >= ROW_GROUP_BYTES:
            yield rows
            rows, size = [], 0
    if rows:
        yield rows


def _columns(example: EncodedExample) -> dict[str, Any]:
    tensors = {name: np.ascontiguousarray(value) for name, value in example.tensors.items()}
    return {
        "input_ids": example.input_ids,
        "segments": _run_lengths(example.kinds),
        "tensors": save_tensors(tensors) if tensors else None,
    }


def _run_lengths(kinds: np.ndarray) -> list[int]:
    """`[kind, length, kind, length, ...]` of the runs of equal kinds."""
    starts = np.flatnonzero(np.diff(kinds, prepend=255))
    lengths = np.diff(starts, append=len(kinds))
    return np.stack([kinds[starts], lengths], axis=1).astype(int).ravel().tolist()
