"""Checkpoints of packed trials: a folder or URI a trial, in which the latest whole checkpoint is the one
that counts."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs

from vlmtune.storage import filesystem, write_json

REPORT = "report.json"  # in a checkpoint, written last: the metrics that came with it


def save_checkpoint(write: Callable[[Path], None], folder: str, metrics: dict[str, Any]) -> None:
    """Let `write` fill `folder` (`.../checkpoint-STEP`), or a local one that is brought there, and delete
    the trial's earlier ones."""
    fs, inner = filesystem(folder)
    fs.create_dir(inner, recursive=True)
    if isinstance(fs, pafs.LocalFileSystem):
        write(Path(inner))
    else:
        with tempfile.TemporaryDirectory() as local:
            write(Path(local))
            pafs.copy_files(local, inner, destination_filesystem=fs)
    write_json(f"{folder}/{REPORT}", metrics)
    parent, _, name = inner.rpartition("/")
    for step, path in _whole(fs, parent):
        if step != _step(name):
            fs.delete_dir(path)


def last_report(folder: str) -> dict[str, Any] | None:
    """The metrics of the latest whole checkpoint of a trial; None if there is none."""
    fs, inner = filesystem(folder)
    whole = _whole(fs, inner)
    if not whole:
        return None
    with fs.open_input_stream(f"{max(whole)[1]}/{REPORT}") as stream:
        metrics: dict[str, Any] = json.loads(stream.read())
    return metrics


@contextmanager
def last_checkpoint(folder: str) -> Iterator[str | None]:
    """A local copy of the latest whole checkpoint of a trial, for as long as the block runs; None if there
    is none."""
    fs, inner = filesystem(folder)
    whole = _whole(fs, inner)
    if not whole:
        yield None
        return
    with tempfile.TemporaryDirectory() as local:
        pafs.copy_files(max(whole)[1], local, source_filesystem=fs)
        yield local


def _whole(fs: pafs.FileSystem, folder: str) -> list[tuple[int, str]]:
    """(step, path) of the checkpoints in a trial's folder that were written to their end."""
    entries = fs.get_file_info(pafs.FileSelector(folder, allow_not_found=True))
    found = [
        entry.path
        for entry in entries
        if entry.type == pafs.FileType.Directory and entry.base_name.startswith("checkpoint-")
    ]
    marks = fs.get_file_info([f"{path}/{REPORT}" for path in found])
    return [
        (_step(path), path)
        for path, mark in zip(found, marks, strict=True)
        if mark.type == pafs.FileType.File
    ]


def _step(path: str) -> int:
    return int(path.rpartition("-")[2])
