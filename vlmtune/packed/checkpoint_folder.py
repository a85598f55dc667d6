"""Write and read a packed trial's checkpoints in its folder or URI.

A trial resumes from the last undamaged one.
"""

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

# File with the metrics that were reported with the checkpoint. It is written last: with it, a checkpoint is
# complete.
REPORT_FILE = "report.json"
KEPT_CHECKPOINTS = 2  # checkpoints of a trial: if the last one is damaged, the one before it is used

Note = Callable[[str], object]


def checkpoint_at(folder: str, step: int) -> str:
    """Folder or URI of a trial's checkpoint after a step."""
    return f"{folder}/checkpoint-{step}"


def ignore_line(line: str) -> None:
    """A `note` that shows no lines."""


def write_checkpoint(write: Callable[[Path], None], folder: str, metrics: dict[str, Any]) -> None:
    """Write a checkpoint. Of the trial's older ones, keep the last and that of the best evaluation.

    Args:
        write: writes the checkpoint's files into a local folder.
        folder: `.../checkpoint-STEP`, a folder or URI.
        metrics: the metrics that are reported with the checkpoint.
    """
    fs, path = filesystem(folder)
    report = json.dumps(metrics, indent=2, ensure_ascii=False, default=str) + "\n"
    if fs.get_file_info(path).type == pafs.FileType.Directory:
        fs.delete_dir(path)  # left by a process that was killed while it wrote
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


def read_last_report(folder: str, note: Note = ignore_line) -> dict[str, Any] | None:
    """The metrics of a trial's last undamaged checkpoint; None if there is none.

    Args:
        note: called with a line about each damaged checkpoint that is skipped.
    """
    fs, path = filesystem(folder)
    last = _last_undamaged(fs, path, note)
    return None if last is None else last[1]


def complete_reports(fs: pafs.FileSystem, folder: str) -> list[dict[str, Any]]:
    """The metrics of a trial's complete checkpoints, in the order of their steps."""
    reports = (_read_report(fs, path) for _, path in sorted(_complete_checkpoints(fs, folder)))
    return [report for report in reports if report is not None]


@contextmanager
def fetch_last_checkpoint(folder: str) -> Iterator[str | None]:
    """A local copy, during the block, of a trial's last undamaged checkpoint; None if there is none."""
    fs, path = filesystem(folder)
    last = _last_undamaged(fs, path, ignore_line)
    if last is None:
        yield None
        return
    with tempfile.TemporaryDirectory() as local:
        pafs.copy_files(last[0], local, source_filesystem=fs)
        yield local


def _last_undamaged(fs: pafs.FileSystem, folder: str, note: Note) -> tuple[str, dict[str, Any]] | None:
    """Path and metrics of the last checkpoint whose files match their checksums."""
    for step, path in sorted(_complete_checkpoints(fs, folder), reverse=True):
        damaged = damaged_file(fs, path)
        report = _read_report(fs, path)
        if damaged is None and report is not None:
            return path, report
        name = damaged or REPORT_FILE
        note(f"{path}/{name} is damaged: the checkpoint before step {step} is used")
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
    """(step, path) of each checkpoint of a trial that was written completely."""
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
