"""Local paths and URIs behind one interface: file systems, names, and atomic writes."""

import json
import os
import posixpath
import re
import stat
from collections.abc import Sequence
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from vlmtune.shown_text import redacted_values

PART = ".part"  # suffix of a file that is being written


def scheme(path: str) -> str:
    """The lower-case scheme of a URI (`s3`, `file`, `https`, `data`); an empty string for a plain path."""
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]+)://", path) or re.match(r"(data):", path, re.IGNORECASE)
    return match.group(1).lower() if match else ""


def absolute(path: str) -> str:
    """A plain path or `file://` URI as an absolute local path; another URI without a slash at its end.

    Raises:
        ValueError: for a `file://` URI that names another host.
    """
    if scheme(path) == "file":
        parts = urlsplit(path)
        if parts.netloc not in ("", "localhost"):
            raise ValueError(f"file URI names the host {parts.netloc!r}; write file:///path")
        return posixpath.normpath(unquote(parts.path))
    return path.rstrip("/") if scheme(path) else posixpath.abspath(posixpath.expanduser(path))


def join(folder: str, name: str) -> str:
    """The path or URI of `name` below `folder`.

    Args:
        folder: an absolute path, or a URI; its `?options` stay at the end.
        name: a plain relative path.
    """
    if not scheme(folder):
        return posixpath.join(folder, name)
    base, _, options = folder.partition("?")
    return f"{base.rstrip('/')}/{quote(name)}" + (f"?{options}" if options else "")


def parent(path: str) -> str:
    """The folder of an absolute path or URI."""
    base, _, options = path.partition("?")
    return (
        posixpath.dirname(base) + (f"?{options}" if options else "")
        if scheme(path)
        else posixpath.dirname(path)
    )


def filesystem(path: str) -> tuple[fs.FileSystem, str]:
    """The pyarrow file system of a path or URI, and the path inside it.

    Raises:
        ValueError, NotImplementedError: for a scheme that pyarrow does not know.
        OSError: if the service cannot be reached.
    """
    if scheme(path) in ("", "file"):
        return fs.LocalFileSystem(), absolute(path)
    parts = urlsplit(path)
    service, prefix = _service(
        f"{parts.scheme}://{parts.netloc}/" + (f"?{parts.query}" if parts.query else "")
    )
    return service, f"{prefix.rstrip('/')}/{unquote(parts.path).lstrip('/')}".rstrip("/")


def special_file(path: str) -> str | None:
    """What a local path is if it is no regular file, such as "a pipe"; None for a file or nothing."""
    try:
        mode = Path(path).stat().st_mode
    except (OSError, ValueError):
        return None
    if stat.S_ISREG(mode):
        return None
    kinds = ((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"))
    return next((kind for is_kind, kind in kinds if is_kind(mode)), "a device")


def check_no_special_file(path: str) -> None:
    """Raises OSError for a local pipe, socket or device, which could be read without end."""
    if scheme(path) in ("", "file") and (kind := special_file(absolute(path))) not in (None, "a folder"):
        raise OSError(f"it is {kind}, not a file")


def one_line(error: BaseException) -> str:
    """The message of `error` without line breaks."""
    return " ".join(str(error).split()) or type(error).__name__


@lru_cache(maxsize=64)
def _service(uri: str) -> tuple[fs.FileSystem, str]:
    """The file system of a URI and its prefix. Cached, because opening an S3 bucket may need a request."""
    service, prefix = fs.FileSystem.from_uri(uri)
    return service, prefix


def exists(path: str) -> bool:
    """Whether the path or URI names a file; False for a folder."""
    files, inner = filesystem(path)
    return bool(files.get_file_info(inner).type == fs.FileType.File)


def file_states(paths: Sequence[str]) -> list[tuple[str, str]]:
    """(path, state) of each file, where the state is its type, size and time of the last change.

    Web addresses are left out, because asking for their state costs a request each.
    """
    states = []
    for service, names in groupby(paths, key=scheme):
        group = list(names)
        if service in ("http", "https"):
            continue
        files = filesystem(group[0])[0]
        infos = files.get_file_info([filesystem(path)[1] for path in group])
        states += [
            (path, f"{info.type.name} {info.size} {info.mtime_ns}")
            for path, info in zip(group, infos, strict=True)
        ]
    return states


def read_text(path: str) -> str:
    """The content of a text file in UTF-8."""
    files, inner = filesystem(path)
    with files.open_input_stream(inner) as stream:
        return bytes(stream.read()).decode()


def write_text(path: str, text: str) -> None:
    """Write a text file atomically: write it under another name, then rename it."""
    content = text.encode()
    files, inner = filesystem(path)
    files.create_dir(inner.rpartition("/")[0], recursive=True)
    _remove_link(path, f"{inner}{PART}")
    with files.open_output_stream(f"{inner}{PART}") as stream:
        stream.write(content)
    files.move(f"{inner}{PART}", inner)


def _remove_link(path: str, part: str) -> None:
    """Remove a link that has the name of the part file: writing to it would change another file."""
    if scheme(path) in ("", "file") and Path(part).is_symlink():
        Path(part).unlink()


def write_table(table: pa.Table, path: str) -> None:
    """Write a table as a Parquet file atomically. Its footer is read back before the file gets its name.

    Raises:
        OSError: the file could not be written completely.
    """
    files, inner = filesystem(path)
    files.create_dir(inner.rpartition("/")[0], recursive=True)
    _remove_link(path, f"{inner}{PART}")
    pq.write_table(table, f"{inner}{PART}", filesystem=files)
    rows = pq.read_metadata(f"{inner}{PART}", filesystem=files).num_rows
    if rows != table.num_rows:
        raise OSError(f"{path}: {table.num_rows} rows were written, but {rows} are there")
    files.move(f"{inner}{PART}", inner)


def write_json(path: str, values: dict[str, Any]) -> None:
    """Write a JSON file atomically. A value that JSON does not know is written as its `str`.

    Secrets in URIs are left out: the file may be published.
    """
    values = {name: redacted_values(value) for name, value in values.items()}
    write_text(path, json.dumps(values, indent=2, ensure_ascii=False, default=str) + "\n")


def apply_umask(folder: Path | str) -> None:
    """Give a folder's files the default mode of new files, because safetensors makes them private."""
    mask = os.umask(0)
    os.umask(mask)
    for file in Path(folder).iterdir():
        if file.is_file():
            file.chmod(0o666 & ~mask)
