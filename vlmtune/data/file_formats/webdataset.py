"""Reads WebDataset: tar shards in which the files with the same name and different endings are one row."""

import json
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from vlmtune.data.fragment import Format, Fragment, PathContents, open_file, suffix
from vlmtune.data.names import IMAGE_SUFFIXES
from vlmtune.data.records import RawRow
from vlmtune.errors import DataError
from vlmtune.storage import join

TAR_HEAD = b"ustar"  # from byte 257 on
IMAGES = "image files"  # key of a row's images while its files are collected
MAX_MEMBER_BYTES = 100_000_000


def _is_shard(contents: PathContents) -> bool:
    return contents.suffix == ".tar" or (contents.head or b"")[257:262] == TAR_HEAD


def _is_folder_of_shards(contents: PathContents) -> bool:
    return any(suffix(name) == ".tar" for name in contents.files)


def _cut(contents: PathContents) -> list[Fragment]:
    return [_shard_fragment(contents.whole)]


def _cut_folder(contents: PathContents) -> list[Fragment]:
    whole = contents.whole
    names = [name for name in contents.files if suffix(name) == ".tar"]
    return [
        _shard_fragment(replace(whole, path=join(whole.path, name), shown_path=f"{whole.shown_path}/{name}"))
        for name in names
    ]


def _shard_fragment(whole: Fragment) -> Fragment:
    try:
        first = next(_rows(whole), None)
    except tarfile.TarError as error:
        raise DataError(f"{whole.shown_path} is no tar file that can be read: {error}") from error
    if first is None:
        raise DataError(f"{whole.shown_path} holds no file: nothing to learn from")
    if first.error is None:
        whole.columns.check(list(first.record), whole.shown_path)
    return replace(whole, format=SHARD.name)


def _rows(fragment: Fragment) -> Iterator[RawRow]:
    key: str | None = None
    row: dict[str, Any] = {}
    error: str | None = None
    with open_file(fragment.path) as file, tarfile.open(fileobj=file, mode="r|") as tar:
        for member in tar:
            name = member.name.removeprefix("./")
            if not member.isfile() or name.rpartition("/")[2].startswith("."):
                continue
            folder, _, base = name.rpartition("/")
            stem, _, ending = base.partition(".")
            member_key = f"{folder}/{stem}" if folder else stem
            if key is not None and member_key != key:
                yield _row(fragment, key, row, error)
                row, error = {}, None
            key = member_key
            try:
                fields = _fields(ending.lower(), _content(tar, member))
                row |= fields | {IMAGES: [*row.get(IMAGES, []), *fields.get(IMAGES, [])]}
            except ValueError as fault:
                error = f"{name}: {fault}"
        if key is not None:
            yield _row(fragment, key, row, error)


def _row(fragment: Fragment, key: str, row: dict[str, Any], error: str | None) -> RawRow:
    images = row.pop(IMAGES, [])
    if images:
        row = {**row, "images": images} if len(images) > 1 else {**row, "image": images[0]}
    return RawRow(f"{fragment.shown_path}:{key}", row, group_fields={**row, "key": key}, error=error)


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    if member.size > MAX_MEMBER_BYTES:
        raise ValueError(f"it is larger than {MAX_MEMBER_BYTES // 10**6} MB")
    file = tar.extractfile(member)
    return b"" if file is None else file.read()


def _fields(ending: str, content: bytes) -> dict[str, Any]:
    """The fields that one file of a row gives, by its ending: `jpg`, `json`, `txt`, `cls` or another text."""
    last = ending.rpartition(".")[2]
    if f".{last}" in IMAGE_SUFFIXES:
        return {IMAGES: [{"bytes": content, "path": None}]}
    if last == "json":
        fields = json.loads(content)
        if not isinstance(fields, dict):
            return {ending: fields}
        return {name: value for name, value in fields.items() if name not in ("image", "images")}
    return {"label" if last == "cls" else ending: content.decode("utf-8").strip()}


SHARD = Format("webdataset", _is_shard, _cut, _rows)
SHARDS = Format("webdataset", _is_folder_of_shards, _cut_folder, _rows)
