"""The prepared store: rows that were tokenized and resized once, in Parquet files that every trial can read.

FOLDER/rows-*.parquet     shards with the `EncodedExample`s, in row groups of about a megabyte
FOLDER/index.parquet      for each row: its shard and position, split, source and lengths
FOLDER/facts.parquet      for each row: values that only the data report shows
FOLDER/images.parquet     the image files that rows name, with their state
FOLDER/bad_rows.jsonl     a line for each row that was left out: source, reason, and kind of reason
FOLDER/meta.json          `StoreMeta`; written last, so a folder without it is unfinished
"""

import io
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors

from vlmtune.data.encoded_example import EncodedExample
from vlmtune.data.split import TRAIN
from vlmtune.data.store_meta import StoreMeta
from vlmtune.errors import DataError
from vlmtune.image_resolution import ImageResolution
from vlmtune.model_ref import ModelRef
from vlmtune.shown_text import with_secrets_of
from vlmtune.storage import file_states, filesystem, one_line

BAD_ROWS = "bad_rows.jsonl"
BAD_ROWS_IN_MESSAGE = 5
OPEN_SHARDS = 256  # shards that this process keeps open, of all stores
ROWS = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("segments", pa.list_(pa.int32())),  # kind, length, kind, length, … of `EncodedExample.kinds`
        ("tensors", pa.binary()),  # safetensors
        ("record", pa.string()),  # if the store is not encoded: the row as it was read, as JSON
        ("files", pa.list_(pa.binary())),  # the row's images that are not paths: see `record_columns`
    ],
)
INDEX = pa.schema(
    [
        ("fragment", pa.int32()),  # index in `ScannedData.fragments`
        ("number", pa.int64()),  # position of the row in its fragment
        ("source", pa.string()),  # the row's place for people, such as FILE:LINE
        ("split", pa.string()),
        ("group", pa.string()),
        ("tokens", pa.int32()),
        ("image_tokens", pa.int32()),
        ("answer_tokens", pa.int32()),
        ("required", pa.int32()),  # see `encoded_example.required_length`
        ("shard", pa.string()),
        ("row_group", pa.int32()),
        ("offset", pa.int32()),
    ]
)
IMAGES = pa.schema([("path", pa.string()), ("state", pa.string())])
SHARD_NAME = re.compile(r"rows-[0-9-]+\.parquet")  # of a file in the store's own folder


class Store:
    """A finished store. Opening it reads `meta.json` and the index. It is pickled as its path.

    Opening and reading raise DataError if a file of the store is gone or damaged. The class is long because
    it reads every file of the folder: index, shards, facts, bad rows and states of images.

    Args:
        train_splits: the splits whose rows count as training rows. A refit adds the evaluation rows.
        model: the model whose processor encodes the rows of a store that is not encoded. It comes from the
            settings, because a store's folder must not decide whose code runs.
        others: the same rows at other image resolutions, if a search varies the resolution.
    """

    def __init__(
        self,
        folder: str,
        train_splits: tuple[str, ...] = (TRAIN,),
        model: ModelRef | None = None,
        others: tuple["Store", ...] = (),
    ) -> None:
        self.folder = folder
        self.train_splits = train_splits
        self.model = model
        self.others = others
        fs, inner = filesystem(folder)
        with self._damage_as_data_error("meta.json"), fs.open_input_stream(f"{inner}/meta.json") as stream:
            self.meta = StoreMeta.from_dict(json.loads(stream.read()))
        with self._damage_as_data_error("index.parquet"):
            self.index = pq.read_table(f"{inner}/index.parquet", filesystem=fs)
            _check_index(self.index, self.meta.rows)
        self._splits = self.index.column("split").to_numpy(zero_copy_only=False)
        columns = (self.index.column(name).to_pylist() for name in ("shard", "row_group", "offset"))
        self._places = list(zip(*columns, strict=True))

    def __reduce__(self) -> tuple[type, tuple[str, tuple[str, ...], ModelRef | None, tuple["Store", ...]]]:
        return Store, (self.folder, self.train_splits, self.model, self.others)

    @property
    def resolutions(self) -> tuple["Store", ...]:
        """This store, and those of the same rows at other resolutions."""
        return (self, *self.others)

    @property
    def largest(self) -> "Store":
        """Of `resolutions`, the one with the longest row in tokens."""
        return max(self.resolutions, key=lambda store: int(store.column("tokens").max(initial=0)))

    def at(self, resolution: ImageResolution) -> "Store":
        """The store of the same rows at a resolution, this one where a search does not vary it.

        Raises:
            KeyError: no rows were prepared at this resolution.
        """
        if not self.others:
            return self
        return {store.model.resolution: store for store in self.resolutions if store.model}[resolution]

    def first_number(self, resolution: ImageResolution) -> int:
        """Where the rows of a resolution begin, where those of all `resolutions` are numbered in turn."""
        return self.resolutions.index(self.at(resolution)) * self.meta.rows

    @staticmethod
    def exists(folder: str) -> bool:
        """Whether `folder` holds a finished store."""
        fs, inner = filesystem(folder)
        info: pafs.FileInfo = fs.get_file_info(f"{inner}/meta.json")
        return bool(info.type == pafs.FileType.File)

    def images_unchanged(self, given: Sequence[str] = ()) -> bool:
        """Whether the image files that rows name are unchanged since the store was made.

        It compares size and time of the last change, not the content.

        Args:
            given: the paths and URIs of the data, with the secrets that the store does not hold.
        """
        known = self.image_states()
        now = file_states([with_secrets_of(path, given) for path, _ in known])
        return [state for _, state in now] == [state for _, state in known]

    def image_states(self) -> list[tuple[str, str]]:
        """(path, state) of the images of rows when the store was made; see `storage.file_states`.

        URIs have no secrets.
        """
        fs, inner = filesystem(self.folder)
        with self._damage_as_data_error("images.parquet"):
            known = pq.read_table(f"{inner}/images.parquet", filesystem=fs).to_pydict()
        return list(zip(known["path"], known["state"], strict=True))

    def unusable_reason(
        self, on_bad_row: str, max_bad_fraction: float = 1.0, *, list_rows: bool = True
    ) -> str | None:
        """Why the rows must not be used, in one line; None if they may be used.

        Args:
            on_bad_row: "error" or "skip", see `--on_bad_row`.
            max_bad_fraction: the largest share of the rows that "skip" may leave out. Frames without a row in
                labels.csv do not count.
            list_rows: whether the message names the first bad rows with their reasons.
        """
        bad = self.meta.bad_rows
        if not bad:
            return self.meta.problem
        if on_bad_row != "skip":
            reason = self._bad_rows_message(list_rows, "; --on_bad_row skip continues without them")
            return reason if self.meta.rows else self._bad_rows_message(list_rows, "")
        if not self.meta.rows:
            return f"{self.meta.problem}; {self._bad_rows_message(list_rows, '')}"
        counted = bad - self.meta.unlabelled
        if counted > max_bad_fraction * (self.meta.rows + counted):
            return self._bad_rows_message(
                list_rows,
                f", more than --max_bad_fraction {max_bad_fraction:g}; repair them, or give a larger one",
            )
        return self.meta.problem

    def bad_rows(self) -> Iterator[dict[str, str]]:
        """The rows that were left out, as {"source", "reason", "kind"}.

        `kind` is the reason without numbers and paths, so that equal kinds can be counted.
        """
        fs, inner = filesystem(self.folder)
        with self._damage_as_data_error(BAD_ROWS), fs.open_input_file(f"{inner}/{BAD_ROWS}") as stream:
            yield from map(json.loads, io.BufferedReader(stream))

    def copy_bad_rows(self, path: str) -> None:
        """Copy the list of rows that were left out, with their reasons, to a file or URI."""
        source, inner = filesystem(self.folder)
        target, out = filesystem(path)
        pafs.copy_files(f"{inner}/{BAD_ROWS}", out, source_filesystem=source, destination_filesystem=target)

    def facts(self) -> pa.Table:
        """The columns `facts.FACTS`, which only the data report needs, in row order."""
        fs, inner = filesystem(self.folder)
        with self._damage_as_data_error("facts.parquet"):
            facts: pa.Table = pq.read_table(f"{inner}/facts.parquet", filesystem=fs)
        return facts

    def rows_of(self, split: str) -> np.ndarray:
        """The row numbers of a split, in the order of the data; shape `[n]`."""
        return np.flatnonzero(np.isin(self._splits, self.train_splits if split == TRAIN else (split,)))

    def column(self, name: str) -> np.ndarray:
        """One column of the index, in row order."""
        values: np.ndarray = self.index.column(name).to_numpy(zero_copy_only=False)
        return values

    def read(self, rows: Sequence[int]) -> list[EncodedExample]:
        """The examples of these rows, in this order. Each row group is read once for the call."""
        examples = []
        for shard, columns in self._columns_of(rows):
            with self._damage_as_data_error(shard):
                examples.append(self._example(columns))
        return examples

    def _example(self, row: dict[str, Any]) -> EncodedExample:
        ids = np.asarray(row["input_ids"], dtype=np.int32)
        kinds, lengths = np.asarray(row["segments"], dtype=np.int64).reshape(-1, 2).T
        tensors = load_tensors(row["tensors"]) if row["tensors"] is not None else {}
        axes = self.meta.input_format.token_axes(tensors, len(ids))
        return EncodedExample(ids, np.repeat(kinds, lengths).astype(np.uint8), tensors, axes)

    def records(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """The rows as they were read, if the store is not encoded."""
        records = []
        for shard, columns in self._columns_of(rows):
            with self._damage_as_data_error(shard):
                record = json.loads(columns["record"])
                images = iter(columns["files"])
                record["images"] = [next(images) if path is None else path for path in record["images"]]
                records.append(record)
        return records

    def _columns_of(self, rows: Sequence[int]) -> Iterator[tuple[str, dict[str, Any]]]:
        groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
        for row in rows:
            shard, group, offset = self._places[row]
            if (shard, group) not in groups:
                groups[shard, group] = self._row_group(shard, group)
            yield shard, groups[shard, group][offset]

    def _row_group(self, shard: str, group: int) -> list[dict[str, Any]]:
        with self._damage_as_data_error(shard):
            file = _open_shard(f"{self.folder}/{shard}")
            columns = file.read_row_group(group, use_threads=False).to_pydict()
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]

    def _bad_rows_message(self, list_rows: bool, way_out: str) -> str:
        """One line: the first bad rows with their reasons, and the way out."""
        bad = self.meta.bad_rows
        count = f"{bad} of {bad + self.meta.rows} rows are bad{way_out}"
        if not list_rows:
            return count
        first = islice(self.bad_rows(), BAD_ROWS_IN_MESSAGE)
        listed = "; ".join(f"{row['source']}: {row['reason']}" for row in first)
        more = f"; and {bad - BAD_ROWS_IN_MESSAGE} more" if bad > BAD_ROWS_IN_MESSAGE else ""
        return f"{listed}{more} ({count})"

    @contextmanager
    def _damage_as_data_error(self, name: str) -> Iterator[None]:
        """Raise DataError, with the way out, if reading the file `name` of the store fails."""
        try:
            yield
        except (
            OSError,
            ValueError,
            KeyError,
            TypeError,
            StopIteration,
            RecursionError,
            SafetensorError,
        ) as error:  # pyarrow's and json's are ValueErrors
            raise DataError(
                f"prepared rows {self.folder}/{name} cannot be read ({one_line(error)}): "
                f"delete {self.folder} to prepare again"
            ) from error


def record_columns(row: dict[str, Any]) -> dict[str, Any]:
    """A row of `formats.read_fragment` as columns of ROWS; `Store.records` reads it back.

    In the JSON, null stands for an image whose bytes are in the column `files`.
    """
    paths = [image if isinstance(image, str) else None for image in row["images"]]
    files = [image for image in row["images"] if isinstance(image, bytes)]
    return {"record": json.dumps({**row, "images": paths}), "files": files}


def _check_index(index: pa.Table, rows: int) -> None:
    """Raises ValueError if the index has another schema or length, or names files outside the store."""
    if not index.schema.equals(INDEX) or len(index) != rows:
        raise ValueError("it is not the index that meta.json tells of")
    for name in index.column("shard").unique().to_pylist():
        if name is None or not SHARD_NAME.fullmatch(name):
            raise ValueError(f"it names {name!r:.40}, which is no file of a store")


@lru_cache(maxsize=OPEN_SHARDS)
def _open_shard(path: str) -> pq.ParquetFile:
    fs, inner = filesystem(path)
    # With `pre_buffer`, an open shard would keep 1.3 MB of what it has read ahead.
    return pq.ParquetFile(fs.open_input_file(inner), page_checksum_verification=True, pre_buffer=False)
