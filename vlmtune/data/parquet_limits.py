"""How much one Parquet row group may unpack to: a file of some kilobytes can hold gigabytes."""

from collections.abc import Collection, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vlmtune.errors import DataError

ROWS_AT_ONCE = 32
BATCH_BYTES = 256_000_000  # in memory at once
# Text compresses some ten times, tables of equal values a hundred times. Below the size it does no harm.
MAX_RATIO = 200
HARMLESS_BYTES = 32_000_000
MAX_GROUP_BYTES = 16_000_000_000
MAX_TEXT_BYTES = 16_000_000  # of a row; as in JSON


def rows_at_once(file: pq.ParquetFile, group: int, columns: Collection[str], shown_path: str) -> int:
    """How many rows of a row group are read at once.

    Raises:
        DataError: the row group unpacks to far more than a dataset's does.
    """
    parts = file.metadata.row_group(group)
    longest = 1.0  # bytes of a row at most
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
    """(row, None) of each row of a batch, or (None, reason) of one that is too large."""
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
