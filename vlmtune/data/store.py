"""The prepared store: rows that were tokenised and resized once, in Parquet, readable at random by any trial
on any node.

FOLDER/rows-*.parquet     what `Example` holds, in row groups of about a megabyte
FOLDER/index.parquet      a line per row: where it is, its split, source and lengths
FOLDER/facts.parquet      a line per row: what only the preflight tells of it
FOLDER/images.parquet     the image files that rows name, and their state
FOLDER/bad_rows.jsonl     a line per row that was left out: source, reason, and the kind of reason
FOLDER/meta.json          how to pad, stack and normalise; written last, so a folder without it is not a store
"""

import io
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby, islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from vlmtune.data.collate import Pixels
from vlmtune.data.tokenize import Example
from vlmtune.errors import DataError
from vlmtune.storage import filesystem, one_line, scheme

BAD_ROWS = "bad_rows.jsonl"
SHOWN_BAD_ROWS = 5  # in a message
ROW_GROUP_BYTES = (
    1 << 20
)  # what one random read fetches: a few LLaVA images (0.34 MB each), thousands of text rows
ROWS = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("segments", pa.list_(pa.int32())),
        ("tensors", pa.binary()),
        ("record", pa.binary()),
    ],
)
INDEX = pa.schema(
    [
        ("piece", pa.int32()),
        ("number", pa.int64()),
        ("source", pa.string()),
        ("split", pa.string()),
        ("group", pa.string()),
        ("tokens", pa.int32()),
        ("image_tokens", pa.int32()),
        ("answer_tokens", pa.int32()),
        ("required", pa.int32()),
        ("shard", pa.string()),
        ("row_group", pa.int32()),
        ("offset", pa.int32()),
    ]
)

IMAGES = pa.schema([("path", pa.string()), ("state", pa.string())])


def file_states(paths: Sequence[str]) -> list[tuple[str, str]]:
    """(path, size and time of the last change) of each file; a web address has no state that could be asked
    for cheaply."""
    states = []
    for service, names in groupby(paths, key=scheme):
        group = list(names)
        if service in ("http", "https"):
            continue
        fs = filesystem(group[0])[0]
        infos = fs.get_file_info([filesystem(path)[1] for path in group])
        states += [
            (path, f"{info.type.name} {info.size} {info.mtime_ns}")
            for path, info in zip(group, infos, strict=True)
        ]
    return states


def write_shard(path: str, kept: Sequence[Example | bytes]) -> list[tuple[int, int]]:
    """Write examples, or records of rows as they were read, as one Parquet file; returns (row group, offset
    in it) of each."""
    fs, inner = filesystem(path)
    places: list[tuple[int, int]] = []
    options = {
        "compression": "lz4",
        "use_dictionary": False,
        "write_statistics": False,
        "write_page_checksum": True,
    }
    with fs.open_output_stream(inner) as stream, pq.ParquetWriter(stream, ROWS, **options) as writer:
        for group, rows in enumerate(_row_groups(kept)):
            writer.write_table(pa.Table.from_pylist(rows, schema=ROWS))
            places += [(group, offset) for offset in range(len(rows))]
    return places


def _row_groups(kept: Iterable[Example | bytes]) -> Iterable[list[dict[str, Any]]]:
    rows: list[dict[str, Any]] = []
    size = 0
    for row in kept:
        columns = {"record": row} if isinstance(row, bytes) else _columns(row)
        rows.append(columns)
        size += sum(len(value) for value in columns.values() if value is not None)
        if size >= ROW_GROUP_BYTES:
            yield rows
            rows, size = [], 0
    if rows:
        yield rows


def _columns(example: Example) -> dict[str, Any]:
    tensors = {name: np.ascontiguousarray(value) for name, value in example.tensors.items()}
    return {
        "input_ids": example.input_ids,
        "segments": _run_lengths(example.kinds),
        "tensors": save_tensors(tensors) if tensors else None,
    }


def _run_lengths(kinds: np.ndarray) -> list[int]:
    """`[kind, length, kind, length, ...]` of the segments."""
    starts = np.flatnonzero(np.diff(kinds, prepend=255))
    lengths = np.diff(starts, append=len(kinds))
    return np.stack([kinds[starts], lengths], axis=1).astype(int).ravel().tolist()


@dataclass(frozen=True)
class Meta:
    """What all rows of a store share. `key` names the data, processor and options they were made of.

    `problem`: why its rows cannot be trained on, bad rows apart; None if they can. `encoded`: whether it
    holds token ids and pixels, or
    rows as they were read (`records`). `processor`: the model, revision and trust_remote_code that encode
    them.
    """

    key: str
    pixels: Pixels
    pad_token_id: int
    rows: int
    bad_rows: int
    problem: str | None
    encoded: bool
    processor: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "pixels": self.pixels.to_dict()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Meta":
        return cls(**{**values, "pixels": Pixels.from_dict(values["pixels"])})


class Store:
    """A finished store. Opening reads the index and nothing else; pickles as its path.

    Raises DataError, here and where rows are read, if a file of the store is gone or damaged.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder
        fs, inner = filesystem(folder)
        with self._plain_damage("meta.json"), fs.open_input_stream(f"{inner}/meta.json") as stream:
            self.meta = Meta.from_dict(json.loads(stream.read()))
        with self._plain_damage("index.parquet"):
            self.index = pq.read_table(f"{inner}/index.parquet", filesystem=fs)
        self._splits = self.index.column("split").to_numpy(zero_copy_only=False)
        self._places = list(
            zip(
                *(self.index.column(name).to_pylist() for name in ("shard", "row_group", "offset")),
                strict=True,
            )
        )

    def __reduce__(self) -> tuple[type, tuple[str]]:
        return Store, (self.folder,)

    @staticmethod
    def exists(folder: str) -> bool:
        fs, inner = filesystem(folder)
        found: pafs.FileInfo = fs.get_file_info(f"{inner}/meta.json")
        return bool(found.type == pafs.FileType.File)

    def images_unchanged(self) -> bool:
        """Whether the image files that the rows were made of are as they were then; asks for their state,
        not for their content."""
        fs, inner = filesystem(self.folder)
        with self._plain_damage("images.parquet"):
            known = pq.read_table(f"{inner}/images.parquet", filesystem=fs).to_pydict()
        return file_states(known["path"]) == list(zip(known["path"], known["state"], strict=True))

    def refusal(self, on_bad_row: str, *, named: bool = True) -> str | None:
        """Why these rows must not be trained on with `on_bad_row` "error" or "skip", in one line; None if
        they may.

        `named`: with the first bad rows and their reasons.
        """
        if not self.meta.bad_rows or (on_bad_row == "skip" and self.meta.rows):
            return self.meta.problem
        bad = self._bad_rows_message(named)
        return bad if self.meta.rows else f"{self.meta.problem}; {bad}"

    def bad_rows(self) -> Iterator[dict[str, str]]:
        """The rows that were left out, as {"source", "reason", "kind"}; `kind` is the reason without numbers
        and paths."""
        fs, inner = filesystem(self.folder)
        with self._plain_damage(BAD_ROWS), fs.open_input_file(f"{inner}/{BAD_ROWS}") as stream:
            yield from map(json.loads, io.BufferedReader(stream))

    def facts(self) -> pa.Table:
        """What only the preflight needs to know: `facts.FACTS`, a line per row in row order."""
        fs, inner = filesystem(self.folder)
        with self._plain_damage("facts.parquet"):
            facts: pa.Table = pq.read_table(f"{inner}/facts.parquet", filesystem=fs)
        return facts

    def rows_of(self, split: str) -> np.ndarray:
        """Row numbers of a split, in the order of the sources; shape `[n]`."""
        return np.flatnonzero(self._splits == split)

    def column(self, name: str) -> np.ndarray:
        """One column of the index, in row order."""
        values: np.ndarray = self.index.column(name).to_numpy(zero_copy_only=False)
        return values

    def read(self, rows: Sequence[int]) -> list[Example]:
        """The examples of these rows, in this order. Each row group is read once for the call."""
        examples = []
        for shard, columns in self._columns_of(rows):
            with self._plain_damage(shard):
                examples.append(_example(columns))
        return examples

    def records(self, rows: Sequence[int]) -> list[bytes]:
        """The same of a store whose rows are not encoded: each as it was read, pickled."""
        return [columns["record"] for _, columns in self._columns_of(rows)]

    def _columns_of(self, rows: Sequence[int]) -> Iterator[tuple[str, dict[str, Any]]]:
        groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
        for row in rows:
            shard, group, offset = self._places[row]
            if (shard, group) not in groups:
                groups[shard, group] = self._row_group(shard, group)
            yield shard, groups[shard, group][offset]

    def copy_bad_rows(self, path: str) -> None:
        """Copy the list of rows that were left out, with their reasons, to a file or URI."""
        source, inner = filesystem(self.folder)
        target, out = filesystem(path)
        pafs.copy_files(f"{inner}/{BAD_ROWS}", out, source_filesystem=source, destination_filesystem=target)

    def _bad_rows_message(self, named: bool) -> str:
        """One line on the bad rows: the first few with their reasons, and how to go on without them."""
        count = f"{self.meta.bad_rows} of {self.meta.bad_rows + self.meta.rows} rows are bad; --on_bad_row skip goes on without them"
        if not named:
            return count
        shown = "; ".join(
            f"{row['source']}: {row['reason']}" for row in islice(self.bad_rows(), SHOWN_BAD_ROWS)
        )
        more = (
            f"; and {self.meta.bad_rows - SHOWN_BAD_ROWS} more" if self.meta.bad_rows > SHOWN_BAD_ROWS else ""
        )
        return f"{shown}{more} ({count})"

    def _row_group(self, shard: str, group: int) -> list[dict[str, Any]]:
        with self._plain_damage(shard):
            columns = (
                _open_shard(f"{self.folder}/{shard}").read_row_group(group, use_threads=False).to_pydict()
            )
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]

    @contextmanager
    def _plain_damage(self, name: str) -> Iterator[None]:
        try:
            yield
        except (
            OSError,
            ValueError,
            KeyError,
            SafetensorError,
        ) as error:  # pyarrow's and json's errors are ValueErrors
            raise DataError(
                f"prepared rows {self.folder}/{name} cannot be read ({one_line(error)}): delete {self.folder} to prepare again"
            ) from error


@lru_cache(maxsize=256)
def _open_shard(path: str) -> pq.ParquetFile:
    fs, inner = filesystem(path)
    # A file that reads ahead (`pre_buffer`) keeps what it has read: 1.3 MB a shard, for as long as the shard
    # is open.
    return pq.ParquetFile(fs.open_input_file(inner), page_checksum_verification=True, pre_buffer=False)


def _example(row: dict[str, Any]) -> Example:
    kinds, lengths = np.asarray(row["segments"], dtype=np.int64).reshape(-1, 2).T
    tensors = load_tensors(row["tensors"]) if row["tensors"] is not None else {}
    return Example(
        np.asarray(row["input_ids"], dtype=np.int32), np.repeat(kinds, lengths).astype(np.uint8), tensors
    )
