"""Writes and reads a packed trial's checkpoints in its folder or URI. The latest whole one counts."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs

from vlmtune.checksums import damaged_file, write_checksums
from vlmtune.storage import filesystem, write_text
from vlmtune.training.best_evaluation import BEST_STEP

# The metrics reported with a checkpoint. It is written last, so it marks the checkpoint as complete.
REPORT_FILE = "report.json"
KEPT_CHECKPOINTS = 2  # checkpoints of a trial: if the last one is damaged, the one before it is used

Tell = Callable[[str], object]


def checkpoint_at(folder: str, step: int) -> str:
    """Folder or URI of a trial's checkpoint after a step."""
    return f"{folder}/checkpoint-{step}"


def ignore_line(line: str) -> None:
    """What takes the lines of a caller that shows none."""


def write_checkpoint(write: Callable[[Path], None], folder: str, metrics: dict[str, Any]) -> None:
    """Write a checkpoint, and delete the trial's other ones but the one before and that of its best
    evaluation.

    Args:
        write: fills a local folder.
        folder: `.../checkpoint-STEP`, a folder or URI.
        metrics: the metrics reported with it.
    """
    fs, path = filesystem(folder)
    report = json.dumps(metrics, indent=2, ensure_ascii=False, default=str) + "\n"
    if fs.get_file_info(path).type == pafs.FileType.Directory:
        fs.delete_dir(path)  # of an attempt that was killed
    fs.create_dir(path, recursive=True)
    if isinstance(fs, pafs.LocalFileSystem):
        write(Path(path))
        write_checksums(Path(path), report_json=report)
    else:
        with tempfile.TemporaryDirectory() as local:
            write(Path(local))
            write_checksums(Path(local), report_json=report)
            pafs.copy_files(local, path, destination_filesystem=fs)
    write_text(f"{folder}/{REPORT_FILE}", report)
    complete = sorted(_complete_checkpoints(fs, path.rpartition("/")[0]))
    to_keep = {path, *(other for step, other in complete if step == metrics.get(BEST_STEP))}
    to_keep |= {other for _, other in complete[-KEPT_CHECKPOINTS:]}
    for _, other in complete:
        if other not in to_keep:
            fs.delete_dir(other)


def read_last_report(folder: str, tell: Tell = ignore_line) -> dict[str, Any] | None:
    """The metrics of a trial's latest whole checkpoint; None if there is none.

    Args:
        tell: takes a line on each damaged checkpoint that is passed over.
    """
    fs, path = filesystem(folder)
    last = _last_whole(fs, path, tell)
    return None if last is None else last[1]


def complete_reports(fs: pafs.FileSystem, folder: str) -> list[dict[str, Any]]:
    """The metrics of a trial's complete checkpoints, in the order of their steps."""
    reports = (_read_report(fs, path) for _, path in sorted(_complete_checkpoints(fs, folder)))
    return [report for report in reports if report is not None]


@contextmanager
def fetch_last_checkpoint(folder: str) -> Iterator[str | None]:
    """A local copy of a trial's latest whole checkpoint while the block runs; None if there is none."""
    fs, path = filesystem(folder)
    last = _last_whole(fs, path, ignore_line)
    if last is None:
        yield None
        return
    with tempfile.TemporaryDirectory() as local:
        pafs.copy_files(last[0], local, source_filesystem=fs)
        yield local


def _last_whole(fs: pafs.FileSystem, folder: str, tell: Tell) -> tuple[str, dict[str, Any]] | None:
    """Path and metrics of the latest checkpoint whose files are as they were written."""
    for step, path in sorted(_complete_checkpoints(fs, folder), reverse=True):
        damaged = damaged_file(fs, path)
        report = _read_report(fs, path)
        if damaged is None and report is not None:
            return path, report
        name = damaged or REPORT_FILE
        tell(f"{path}/{name} is damaged: the checkpoint before step {step} is used")
    return None


def _read_report(fs: pafs.FileSystem, path: str) -> dict[str, Any] | None:
    with fs.open_input_stream(f"{path}/{REPORT_FILE}") as stream:
        content = stream.read()
    try:
        report = json.loads(content)
    except ValueError:
        return None
    return report if isinstance(report, dict) and {"step", "max_steps"} <= report.keys() else None


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
