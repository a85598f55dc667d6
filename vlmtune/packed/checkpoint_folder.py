"""Writes and reads a packed trial's checkpoints in its folder or URI. The latest complete one counts."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs

from vlmtune.storage import filesystem, write_json
from vlmtune.training.best_evaluation import BEST_STEP

# The metrics reported with a checkpoint. It is written last, so it marks the checkpoint as complete.
REPORT_FILE = "report.json"


def checkpoint_at(folder: str, step: int) -> str:
    """Folder or URI of a trial's checkpoint after a step."""
    return f"{folder}/checkpoint-{step}"


def write_checkpoint(write: Callable[[Path], None], folder: str, metrics: dict[str, Any]) -> None:
    """Write a checkpoint, and delete the trial's other ones, except that of its best evaluation.

    Args:
        write: fills a local folder.
        folder: `.../checkpoint-STEP`, a folder or URI.
        metrics: the metrics reported with it.
    """
    fs, path = filesystem(folder)
    fs.create_dir(path, recursive=True)
    if isinstance(fs, pafs.LocalFileSystem):
        write(Path(path))
    else:
        with tempfile.TemporaryDirectory() as local:
            write(Path(local))
            pafs.copy_files(local, path, destination_filesystem=fs)
    write_json(f"{folder}/{REPORT_FILE}", metrics)
    parent, _, name = path.rpartition("/")
    kept = (_step(name), metrics.get(BEST_STEP))
    for step, other in _complete_checkpoints(fs, parent):
        if step not in kept:
            fs.delete_dir(other)


def read_last_report(folder: str) -> dict[str, Any] | None:
    """The metrics of a trial's latest complete checkpoint; None if there is none."""
    fs, path = filesystem(folder)
    complete = _complete_checkpoints(fs, path)
    if not complete:
        return None
    with fs.open_input_stream(f"{max(complete)[1]}/{REPORT_FILE}") as stream:
        metrics: dict[str, Any] = json.loads(stream.read())
    return metrics


@contextmanager
def fetch_last_checkpoint(folder: str) -> Iterator[str | None]:
    """A local copy of a trial's latest complete checkpoint while the block runs; None if there is none."""
    fs, path = filesystem(folder)
    complete = _complete_checkpoints(fs, path)
    if not complete:
        yield None
        return
    with tempfile.TemporaryDirectory() as local:
        pafs.copy_files(max(complete)[1], local, source_filesystem=fs)
        yield local


def _complete_checkpoints(fs: pafs.FileSystem, folder: str) -> list[tuple[int, str]]:
    """(step, path) of each checkpoint of a trial that was written to its end."""
    entries = fs.get_file_info(pafs.FileSelector(folder, allow_not_found=True))
    paths = [
        entry.path
        for entry in entries
        if entry.type == pafs.FileType.Directory and entry.base_name.startswith("checkpoint-")
    ]
    reports = fs.get_file_info([f"{path}/{REPORT_FILE}" for path in paths])
    return [
        (_step(path), path)
        for path, report in zip(paths, reports, strict=True)
        if report.type == pafs.FileType.File
    ]


def _step(path: str) -> int:
    return int(path.rpartition("-")[2])
