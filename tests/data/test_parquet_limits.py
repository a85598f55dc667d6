"""How much a Parquet file may unpack to."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from formats_kit import read

from vlmtune.data.parquet_limits import ROWS_AT_ONCE, bounded_rows, rows_at_once
from vlmtune.errors import DataError


def write(path: Path, texts: list[str], **options: object) -> Path:
    table = pa.table({"instruction": texts, "output": ["yes"] * len(texts)})
    pq.write_table(table, path, compression="zstd", **options)
    return path


@pytest.mark.parametrize("dictionary", [True, False])
def test_some_kilobytes_that_unpack_to_gigabytes_are_refused(tmp_path: Path, dictionary: bool) -> None:
    path = write(
        tmp_path / "bomb.parquet",
        ["x" * 60_000_000] * 2,
        use_dictionary=dictionary,
        dictionary_pagesize_limit=10**8,
    )
    assert path.stat().st_size < 60_000
    with pytest.raises(DataError, match="it may be a decompression bomb"):
        read(path)


def test_long_values_are_read_row_by_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long text that a dictionary holds once, and each row names."""
    monkeypatch.setattr("vlmtune.data.parquet_limits.BATCH_BYTES", 2_000_000)
    noise = np.random.default_rng(0).bytes(150_000).hex()
    path = write(tmp_path / "a.parquet", [noise] * 40, dictionary_pagesize_limit=10**8)
    with pq.ParquetFile(path) as file:
        assert rows_at_once(file, 0, ["instruction", "output"], "a") < 10
        assert rows_at_once(file, 0, ["output"], "a") == ROWS_AT_ONCE


def test_a_row_that_is_too_large_is_a_bad_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlmtune.data.parquet_limits.BATCH_BYTES", 20_000_000)
    batch = pa.RecordBatch.from_pydict({"a": ["x" * 30_000_000, "y"]})
    (large, reason), (small, none) = bounded_rows(batch)
    assert (large, small, none) == (None, {"a": "y"}, None)
    assert reason is not None and reason.startswith("the row holds 30 MB, and 20 are allowed")
