"""Limits of the unpacked size of a Parquet row group: a file of kilobytes can unpack to gigabytes."""

from collections.abc import Collection, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vlmtune.errors import DataError

ROWS_AT_ONCE = 32
BATCH_BYTES = 256_000_000  # in memory at once
# Largest compression ratio that is accepted, above HARMLESS_BYTES. Text compresses about ten times, tables of
# equal values a hundred times.
MAX_RATIO = 200
HARMLESS_BYTES = 32_000_000
MAX_GROUP_BYTES = 16_000_000_000
MAX_TEXT_BYTES = 16_000_000  # of a row; the limit for JSON is the same


def rows_at_once(file: pq.ParquetFile, group: int, columns: Collection[str], shown_path: str) -> int:
    """Number of rows of a row group that are read at once.

    Raises:
        DataError: the row group unpacks to far more than is plausible for a data set.
    """
    parts = file.metadata.row_group(group)
    longest = 1.0  # upper bound of the bytes of a row
    for number in range(parts.num_columns):
        part = parts.column(number)
        if part.path_in_schema.partition(".")[0] not in columns:
            continue
        size, stored = part.total_uncompressed_size, max(part.total_compressed_size, 1)
        if size > MAX_GROUP_BYTES or (size > HARMLESS_BYTES and size > MAX_RATIO * stored):
            raise DataError(
                f"{shown_path}: column {part.path_in_schema} unpacks {stored / 1e6:,.2f} MB of the file to "
                f"{size / 1e6:,.0f} MB (row group {group}): it may be a decompression bomb; write it anew in "
                "smaller row groups"
            )
        # A value in a dictionary is stored once, and each row of the chunk may name it.
        longest += size if part.has_dictionary_page else 8 * size / max(parts.num_rows, 1)
    return max(1, min(ROWS_AT_ONCE, int(BATCH_BYTES / longest)))


def bounded_rows(batch: pa.RecordBatch) -> Iterator[tuple[dict[str, Any] | None, str | None]]:
    """(row, None) for each row of a batch, (None, reason) for a row that is too large."""
    if batch.nbytes <= MAX_TEXT_BYTES:
        yield from ((row, None) for row in batch.to_pylist())
        return
    for number in range(batch.num_rows):
        row = batch.slice(number, 1)
        size = row.nbytes
        if size > BATCH_BYTES:
            yield None, f"the row holds {size / 1e6:,.0f} MB, and {BATCH_BYTES // 10**6} are allowed"
        else:
            yield row.to_pylist()[0], None
