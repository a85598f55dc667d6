"""Data files of every understood format → conversation rows: `scan` cuts them in pieces, `read_piece` reads
one anywhere."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import IO, Any, cast

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from vlmtune.compat.datasets import fingerprint_of
from vlmtune.data.frames import Dialogue, Frame, frame_conversations, scan_frames
from vlmtune.data.hub import dataset_records, load_dataset
from vlmtune.data.image_paths import ImageRules, RowError
from vlmtune.data.jsonfiles import BLOCK_BYTES, ArrayReader, StrictDecoder, read_lines, split_lines
from vlmtune.data.records import FIELDS, REQUIRED, RawRow, conversation, group_of
from vlmtune.errors import DataError
from vlmtune.storage import absolute, filesystem, join, one_line, parent, scheme

UNDERSTOOD = (
    "a folder with frames/, messages.txt and labels.csv; .jsonl, .json or .parquet files of instruction, messages or LLaVA rows; "
    "a Hugging Face dataset by name or saved folder"
)
KINDS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".parquet": "parquet"}
FRAMES_PER_PIECE = 256
ROWS_PER_PIECE = 1024  # of a Hugging Face dataset
ROWS_AT_ONCE = 32  # of Parquet in memory; each may hold encoded images
HEAD_BYTES = 64_000
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


@dataclass(frozen=True)
class Piece:
    """One part of the data that any process can read by itself; plain values only.

    `format`: frames, jsonl, json, parquet, saved (a dataset folder) or hub. `path`: absolute path or URI;
    `shown`: the name that the
    user gave. `start`, `stop`: bytes of a JSONL file, rows of a dataset; `start` alone is a row group of
    Parquet. `first`: the number
    of the first line (from 1) or row (from 0). `version`: the fingerprint of a dataset, which its path does
    not show.
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


def scan(
    data_path: str,
    *,
    image_root: str | None = None,
    group_by: str | None = None,
    allow_outside_paths: bool = False,
    allow_remote_images: bool = False,
) -> list[Piece]:
    """Recognises what `data_path` (a file, folder, URI or hub name) holds and cuts it in pieces, in the
    order of its rows.

    Costs one pass over JSONL files to count lines; other files are opened, not read. Image paths start from
    the folder of the file
    that names them, or from `image_root`; those of a frames folder always from the folder itself.
    Raises DataError where the data as a whole cannot be read. Single bad rows come from `read_piece`.
    """
    shown = data_path.rstrip("/") or data_path
    try:
        path = absolute(data_path)
        system, inner = filesystem(path)
        info = system.get_file_info(inner)
        folder = path if info.type == fs.FileType.Directory else parent(path)
        rules = ImageRules(
            absolute(image_root) if image_root else folder, allow_outside_paths, allow_remote_images
        )
        whole = Piece("", path, shown, rules, group_by)
        if image_root:
            _check_folder(rules.root, image_root)
        if info.type == fs.FileType.Directory:
            return _scan_folder(
                whole, [entry.base_name for entry in system.get_file_info(fs.FileSelector(inner))]
            )
        if info.type == fs.FileType.File:
            return _scan_file(whole)
        return _scan_hub(whole, image_root)
    except (OSError, ValueError, NotImplementedError) as error:
        raise DataError(f"{shown} cannot be read: {one_line(error)}") from error


def read_piece(piece: Piece) -> Iterator[dict[str, Any]]:
    """The rows of `piece`, one at a time, as {"source", "messages", "images", "group", "error"}.

    A bad row has its reason in `error`, and empty messages and images. `images` holds absolute paths, URIs
    or encoded bytes, in the
    order of the image parts of `messages`. Raises DataError where the file has become unreadable since
    `scan`.
    """
    try:
        for found in READERS[piece.format](piece):
            yield _row(found, piece)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{piece.shown} cannot be read: {one_line(error)}") from error


def _row(found: RawRow, piece: Piece) -> dict[str, Any]:
    try:
        if found.error is not None:
            raise RowError(found.error)
        messages, images = conversation(found.record, piece.rules)
        group = group_of(found.labels, piece.group_by) if piece.group_by else None
    except RowError as error:
        return {"source": found.source, "messages": [], "images": [], "group": None, "error": str(error)}
    return {"source": found.source, "messages": messages, "images": images, "group": group, "error": None}


def _scan_folder(whole: Piece, names: list[str]) -> list[Piece]:
    if {"dataset_info.json", "state.json"} <= set(names) or "dataset_dict.json" in names:
        return _scan_dataset(replace(whole, format="saved"))
    files = sorted(name for name in names if _suffix(name) in KINDS and not name.startswith((".", "_")))
    if "messages.txt" in names and files:
        raise DataError(
            f"{whole.shown} holds both messages.txt and {files[0]}: give the one to read its own folder"
        )
    if "messages.txt" in names or ("frames" in names and not files):
        if "messages.txt" not in names:
            raise DataError(
                f"{whole.shown} has frames/ but no messages.txt: write an example dialogue there, with USER: and ASSISTANT: turns"
            )
        return _scan_frames(whole)
    if not files:
        raise DataError(
            f"{whole.shown} holds {_listed(names)}, no data that is understood. Understood: {UNDERSTOOD}"
        )
    pieces = [piece for name in files for piece in _scan_file(_inside(whole, name))]
    first = {piece.format: piece.shown for piece in reversed(pieces)}
    if len(first) > 1:
        raise DataError(
            f"{whole.shown} mixes formats: {' and '.join(sorted(first.values()))}; give one of the files, or convert them"
        )
    return pieces


def _scan_file(whole: Piece) -> list[Piece]:
    with _open(whole.path) as file:
        head = file.read(HEAD_BYTES)
    kind = _recognise(head, whole.shown)
    if kind == "parquet":
        return _scan_parquet(whole)
    if kind == "json":
        return [replace(whole, format="json")]
    with _open(whole.path) as file:
        return [
            replace(whole, format="jsonl", start=start, stop=stop, first=line)
            for start, stop, line in split_lines(file, BLOCK_BYTES)
        ]


def _recognise(head: bytes, shown: str) -> str:
    """The kind of a file from its first bytes, and from its name where these leave a choice."""
    named = KINDS.get(_suffix(shown))
    text = head.removeprefix(b"\xef\xbb\xbf").strip()
    if not text:
        raise DataError(f"{shown} is empty: nothing to learn from")
    if head.startswith(b"PAR1"):
        return "parquet"
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"{shown} is UTF-16 text: save it as UTF-8")
    if named == "parquet":
        raise DataError(f"{shown} is no Parquet file: it begins with {head[:8]!r}")
    if re.fullmatch(rb"\[\s*\]", text):
        raise DataError(f"{shown} is an empty array: nothing to learn from")
    one_a_line = _parses(text.partition(b"\n")[0])
    if text.startswith(b"[") and not (named == "jsonl" and one_a_line):
        return "json"
    if named == "json" and not one_a_line and len(head) < HEAD_BYTES:
        raise DataError(
            f"{shown} is neither an array of rows, [{{…}}, …], nor one row a line: put its rows in [ ]"
        )
    if named or text.startswith(b"{"):
        return "jsonl"
    raise DataError(
        f"{shown} is no format that is understood; it begins with {head[:16]!r}. Understood: {UNDERSTOOD}"
    )


def _parses(line: bytes) -> bool:
    try:
        StrictDecoder().decode(line.decode())
    except (ValueError, RecursionError):
        return False
    return True


def _scan_frames(whole: Piece) -> list[Piece]:
    dialogues, frames = scan_frames(whole.path, whole.shown, whole.group_by)
    piece = replace(whole, format="frames", rules=replace(whole.rules, root=whole.path), dialogues=dialogues)
    return [
        replace(piece, frames=tuple(frames[at : at + FRAMES_PER_PIECE]))
        for at in range(0, len(frames), FRAMES_PER_PIECE)
    ]


def _scan_parquet(whole: Piece) -> list[Piece]:
    with _open(whole.path) as file, pq.ParquetFile(file) as table:
        _check_columns(table.schema_arrow.names, whole)
        sizes = [table.metadata.row_group(group).num_rows for group in range(table.num_row_groups)]
    if not sum(sizes):
        raise DataError(f"{whole.shown} has no rows: nothing to learn from")
    firsts = accumulate(sizes, initial=0)
    return [
        replace(whole, format="parquet", start=group, first=first)
        for group, first in zip(range(len(sizes)), firsts, strict=False)
    ]


def _scan_hub(whole: Piece, image_root: str | None) -> list[Piece]:
    """A dataset of the hub, where nothing of this name lies here. Its images may lie in the download cache,
    unless `image_root` is set."""
    missing = f"{whole.shown}: no such file or folder"
    if (
        scheme(whole.path)
        or _suffix(whole.shown) in {*KINDS, ".csv", ".txt"}
        or not HUB_NAME.fullmatch(whole.shown)
    ):
        raise DataError(missing)
    owner = whole.shown.partition("/")[0]
    if (
        owner != whole.shown
        and filesystem(owner)[0].get_file_info(absolute(owner)).type == fs.FileType.Directory
    ):
        raise DataError(f"{missing} in {owner}/")
    import datasets

    rules = whole.rules if image_root else replace(whole.rules, root=str(datasets.config.HF_CACHE_HOME))
    try:
        return _scan_dataset(replace(whole, format="hub", path=whole.shown, rules=rules))
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"{missing} here, and no Hugging Face dataset of that name could be loaded: {one_line(error)}"
        ) from error


def _scan_dataset(whole: Piece) -> list[Piece]:
    data = load_dataset(whole.path, whole.shown, from_hub=whole.format == "hub")
    _check_columns(data.column_names, whole)
    if not len(data):
        raise DataError(f"{whole.shown} has no rows: nothing to learn from")
    starts = range(0, len(data), ROWS_PER_PIECE)
    whole = replace(whole, version=fingerprint_of(data))
    return [
        replace(whole, start=start, stop=min(start + ROWS_PER_PIECE, len(data)), first=start)
        for start in starts
    ]


def _check_columns(names: list[str], whole: Piece) -> None:
    if not any(fields[0] in names for fields in REQUIRED.values()):
        wanted = ", ".join(fields[0] for fields in REQUIRED.values())
        raise DataError(f"{whole.shown} has none of the columns {wanted}; it has: {', '.join(names)}")
    if whole.group_by and whole.group_by not in names:
        raise DataError(
            f"--group_by {whole.group_by}: {whole.shown} has no such column; it has: {', '.join(names)}"
        )


def _read_jsonl(piece: Piece) -> Iterator[RawRow]:
    with _open(piece.path) as file:
        yield from read_lines(file, piece.shown, piece.start, piece.stop, piece.first)


def _read_json(piece: Piece) -> Iterator[RawRow]:
    with _open(piece.path) as file:
        yield from ArrayReader(file, piece.shown)


def _read_frames(piece: Piece) -> Iterator[RawRow]:
    return frame_conversations(piece.frames, piece.dialogues)


def _read_parquet(piece: Piece) -> Iterator[RawRow]:
    with _open(piece.path) as file, pq.ParquetFile(file, buffer_size=1 << 20) as table:
        columns = [name for name in table.schema_arrow.names if name in (*FIELDS, piece.group_by)]
        number = piece.first
        for batch in table.iter_batches(
            ROWS_AT_ONCE, row_groups=[piece.start], columns=columns, use_threads=False
        ):
            for record in batch.to_pylist():
                yield RawRow(f"{piece.shown} row {number}", record, record)
                number += 1


def _read_dataset(piece: Piece) -> Iterator[RawRow]:
    data = load_dataset(piece.path, piece.shown, from_hub=piece.format == "hub")
    columns = [name for name in data.column_names if name in (*FIELDS, piece.group_by)]
    for number, record in enumerate(dataset_records(data, piece.start, piece.stop, columns), piece.first):
        yield RawRow(f"{piece.shown} row {number}", record, record)


READERS: dict[str, Callable[[Piece], Iterator[RawRow]]] = {
    "frames": _read_frames,
    "jsonl": _read_jsonl,
    "json": _read_json,
    "parquet": _read_parquet,
    "saved": _read_dataset,
    "hub": _read_dataset,
}


def _open(path: str) -> IO[bytes]:
    system, inner = filesystem(path)
    return cast(IO[bytes], system.open_input_file(inner))


def _check_folder(path: str, flag_value: str) -> None:
    system, inner = filesystem(path)
    if system.get_file_info(inner).type != fs.FileType.Directory:
        raise DataError(f"--image_root {flag_value}: no such folder")


def _inside(whole: Piece, name: str) -> Piece:
    return replace(whole, path=join(whole.path, name), shown=f"{whole.shown}/{name}")


def _suffix(name: str) -> str:
    stem, dot, ending = name.partition("?")[0].rpartition(".")
    return f".{ending.lower()}" if dot and stem else ""


def _listed(names: list[str]) -> str:
    return (
        ", ".join(sorted(names)[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
        if names
        else "nothing"
    )
