"""The answers of predict.py while they are written: part files of finished rows, joined at the end."""

import json
import logging
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from vlmtune import storage
from vlmtune.console import SECONDS_BETWEEN_LINES
from vlmtune.evaluation.questions import QuestionRow
from vlmtune.progress import Estimate
from vlmtune.storage import PART, filesystem

if TYPE_CHECKING:
    import pandas as pd

logger = logging.getLogger(__name__)

ROWS_PER_PART = 256
SECONDS_PER_PART = 60.0  # a killed run loses at most this much work
SCHEMA = pa.schema(
    [
        ("source", pa.string()),
        ("images", pa.list_(pa.string())),
        ("question", pa.string()),
        ("answer", pa.string()),
        ("reference", pa.string()),
        ("error", pa.string()),
    ]
)


def next_row(folder: str) -> tuple[int, int]:
    """The (fragment, row) that follows the last finished row."""
    finished = [
        tuple(int(number) for number in path.rpartition("/")[2].removesuffix(".jsonl").split("-"))
        for path in list_parts(folder)
    ]
    fragment, row = max(finished, default=(0, -1))
    return fragment, row + 1


def list_parts(folder: str) -> list[str]:
    """The finished parts, in the order of their rows."""
    files, inner = filesystem(folder)
    entries = files.get_file_info(pafs.FileSelector(f"{inner}/parts", allow_not_found=True))
    return sorted(entry.path for entry in entries if entry.base_name.endswith(".jsonl"))


def progress_text(done: int, rows: int | None, estimate: Estimate) -> str:
    """`120 of 800 rows answered, about 40 s left`; `rows` is None if their number is not known."""
    if rows is None:
        return f"{done:,} rows answered"
    left = estimate.text(done, rows)
    return f"{done:,} of {rows:,} rows answered" + (f", {left}" if left else "")


def write_parts(
    folder: str, results: Iterator[tuple[QuestionRow, Any]], model: str, rows: int | None = None
) -> None:
    """Write a part after every ROWS_PER_PART rows or SECONDS_PER_PART seconds, and log the progress.

    Args:
        results: (row, result) in the order of the data, see `actors.answer_rows`.
        model: the name of the model whose answers are written.
        rows: number of rows, if it is known.
    """
    estimate = Estimate()
    lines: list[str] = []
    total, part_start, last_logged = 0, 0.0, 0.0
    last: QuestionRow | None = None

    def write() -> None:
        if last is not None and lines:
            storage.write_text(f"{folder}/parts/{last.fragment:06d}-{last.number:012d}.jsonl", "".join(lines))
            lines.clear()

    for row, result in results:
        if last is not None and (row.fragment, row.number) <= (last.fragment, last.number):
            raise RuntimeError(f"{row.source} came after {last.source}: a resumed run would lose rows")
        last, total = row, total + 1
        lines.append(json.dumps(_record(row, result, model), ensure_ascii=False) + "\n")
        now = time.monotonic()
        if total == 1:  # the time to load the model does not count
            part_start = last_logged = now
            estimate.left(1, rows or 1)
        if len(lines) >= ROWS_PER_PART or now - part_start >= SECONDS_PER_PART:
            write()
            part_start = now
        if now - last_logged >= SECONDS_BETWEEN_LINES:
            logger.info(progress_text(total, rows, estimate))
            last_logged = now
    write()


def _record(row: QuestionRow, result: Any, model: str) -> dict[str, Any]:
    """One row as it is written, with the fields of SCHEMA."""
    return {
        "source": row.source,
        "images": row.images,
        "question": None if result is None else result["question"],
        "answer": None if result is None else result[model]["answer"],
        "reference": result["reference"] if result is not None and row.has_reference else None,
        "error": row.error,
    }


def join_parts(folder: str, form: str) -> tuple[str, int, int]:
    """Join all parts into `predictions.<form>` and delete them. Only one part is in memory at a time.

    Returns:
        The file's path, the number of rows, and the number of rows with an error.
    """
    path = f"{folder}/predictions.{form}"
    files, inner = filesystem(path)
    rows = errors = 0
    with files.open_output_stream(f"{inner}{PART}") as stream:
        table = pq.ParquetWriter(stream, SCHEMA) if form == "parquet" else None
        for part in list_parts(folder):
            with files.open_input_stream(part) as source:
                text = source.read()
            records = [json.loads(line) for line in text.splitlines()]
            rows, errors = rows + len(records), errors + sum(one["error"] is not None for one in records)
            if table is None:
                stream.write(text)
            else:
                table.write_table(pa.Table.from_pylist(records, schema=SCHEMA))
        if table is not None:
            table.close()
    files.move(f"{inner}{PART}", inner)
    if list_parts(folder):
        files.delete_dir(f"{filesystem(folder)[1]}/parts")
    return path, rows, errors


def read_predictions(path: str) -> "pd.DataFrame":
    """The rows of a `predictions.jsonl` or `predictions.parquet`, with the columns of SCHEMA."""
    files, inner = filesystem(path)
    if path.endswith(".parquet"):
        return pq.read_table(inner, filesystem=files).to_pandas()
    with files.open_input_stream(inner) as stream:
        records = [json.loads(line) for line in stream.read().splitlines()]
    return pa.Table.from_pylist(records, schema=SCHEMA).to_pandas()
