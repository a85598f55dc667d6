"""The trials of a search as files, from which the search is resumed, extended and salvaged.

OUT/tune/trials/NUMBER-ID.json     a trial: its values, all its reports, how it ended
OUT/tune/train/ID/trial.json       the same, beside the trial's checkpoints

Each file is replaced as a whole and holds a checksum. Of the two copies, the one with more reports is read,
so nothing is lost if one of them is damaged or missing. Ray's own state is not read, and no file that is read
is a pickle.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from enum import StrEnum
from threading import Condition, Thread
from typing import Any

import pyarrow.fs as pafs

from vlmtune import storage
from vlmtune.packed.checkpoint_folder import complete_reports
from vlmtune.packed.messages import BEST_CHECKPOINT, NOTES
from vlmtune.search.first_points import GRID
from vlmtune.training.best_evaluation import LAST_CHECKPOINT, LIVE_ANSWERS

TRIAL_ID_PATTERN = re.compile(r"[\w-]{1,64}")
# Reports of a trial that keep their answers to the fixed rows; the trial's file is written at each report.
KEPT_ANSWERS = 3
COPY = "trial.json"  # file in the folder of a trial's checkpoints
# What Ray Tune adds to a report. A resumed search has no use for it.
TUNE_KEYS = (
    *("config", "date", "done", "experiment_tag", "hostname", "iterations_since_restore", "node_ip", "pid"),
    *("time_since_restore", "time_this_iter_s", "timestamp", "training_iteration", "trial_id", NOTES),
)


class End(StrEnum):
    """How a trial ended."""

    LAST_REPORT = "its last report"  # it reached its last step, failed, or does not fit in memory
    STOPPED = "early stopping"
    DIVERGED = "diverged"
    BUDGET = "time budget"
    ERROR = "error"
    LOST = "its process died"


@dataclass
class SavedTrial:
    """One trial of a search.

    Attributes:
        number: its place in the order of proposal, counted from 0.
        trial_id: the name of its folders.
        values: its searched values, by flag name.
        parameters: its searched values as Optuna stores them; None in a grid.
        origin: where its values come from, see `first_points`.
        reports: all its reports, one for each step.
        end: how it ended; None while it runs or waits.
        error: why it failed, if it raised; one line.
    """

    number: int
    trial_id: str
    values: dict[str, Any]
    parameters: dict[str, Any] | None = None
    origin: str = GRID
    reports: list[dict[str, Any]] = field(default_factory=list)
    end: End | None = None
    error: str | None = None

    @property
    def last_report(self) -> dict[str, Any]:
        return self.reports[-1] if self.reports else {}

    def add_report(self, report: dict[str, Any]) -> None:
        """Add a report. It replaces reports of the same steps, which a resumed trial trains again."""
        reported = {name: value for name, value in report.items() if name not in TUNE_KEYS}
        if "step" in reported:
            self.reports = [one for one in self.reports if one.get("step", -1) < reported["step"]]
        self.reports.append(reported)
        with_answers = [one for one in self.reports if LIVE_ANSWERS in one]
        for one in with_answers[:-KEPT_ANSWERS]:
            del one[LIVE_ANSWERS]

    def reopen(self) -> None:
        """Let the trial continue, if it ended for a reason that was not its own."""
        if self.end in (End.BUDGET, End.ERROR, End.LOST):
            self.end, self.error = None, None


class SavedTrials:
    """Writes the trials of a search to its folder, in a thread, because writes to object stores are slow.

    Args:
        folder: absolute path or URI of the search's output folder.

    Attributes:
        error: the OSError of the first file that could not be written; nothing is written after it.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.error: OSError | None = None
        self._changed = Condition()
        self._waiting: dict[str, str] = {}  # texts by path
        self._writing = False
        self._thread: Thread | None = None

    def save(self, trial: SavedTrial) -> None:
        """Write a trial as it is now. Returns at once."""
        text = to_text(trial, self.folder)
        with self._changed:
            self._waiting |= dict.fromkeys(paths_of(trial, self.folder), text)
            if self._thread is None:
                self._thread = Thread(target=self._run, name="saved trials", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def flush(self) -> None:
        """Wait until everything is written."""
        with self._changed:
            self._changed.wait_for(lambda: not (self._waiting or self._writing) or self.error is not None)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting)
                path = next(iter(self._waiting))
                text = self._waiting.pop(path)
                self._writing = True
            error = None
            try:
                storage.write_text(path, text)
            except OSError as raised:
                error = raised
            with self._changed:
                self._writing = False
                self.error = self.error or error
                self._changed.notify_all()
                if self.error is not None:
                    return


def paths_of(trial: SavedTrial, folder: str) -> tuple[str, str]:
    """The two files of a trial."""
    return (
        f"{folder}/tune/trials/{trial.number:06d}-{trial.trial_id}.json",
        f"{folder}/tune/train/{trial.trial_id}/{COPY}",
    )


def to_text(trial: SavedTrial, folder: str) -> str:
    """The content of a trial's file. Paths of checkpoints are relative to `folder`, which may be moved."""
    values = asdict(trial)
    inner = storage.filesystem(folder)[1]
    for report in values["reports"]:
        for name in {BEST_CHECKPOINT, LAST_CHECKPOINT} & report.keys():
            report[name] = report[name].removeprefix(f"{folder}/").removeprefix(f"{inner}/")
    body = json.dumps(values, ensure_ascii=False, default=str)
    return json.dumps({"checksum": _checksum(body), "trial": body}) + "\n"


def from_text(text: str, folder: str) -> SavedTrial | None:
    """A trial from its file's content; None if the content is damaged or is not that of a trial."""
    try:
        file = json.loads(text)
        if file["checksum"] != _checksum(file["trial"]):
            return None
        values = json.loads(file["trial"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    if not _is_trial(values):
        return None
    for report in values["reports"]:
        for name in {BEST_CHECKPOINT, LAST_CHECKPOINT} & report.keys():
            path = report[name]
            if not path.startswith("/") and "://" not in path:
                report[name] = f"{folder}/{path}"
    return SavedTrial(**{**values, "end": None if values["end"] is None else End(values["end"])})


def _is_trial(values: Any) -> bool:
    """Whether values have the fields of a trial.

    Its id is checked strictly: folders of that name are deleted.
    """
    if not isinstance(values, dict) or values.keys() != {one.name for one in fields(SavedTrial)}:
        return False
    reports = values["reports"]
    return (
        type(values["number"]) is int
        and isinstance(values["trial_id"], str)
        and TRIAL_ID_PATTERN.fullmatch(values["trial_id"]) is not None
        and isinstance(values["values"], dict)
        and isinstance(values["parameters"], dict | None)
        and isinstance(values["error"], str | None)
        and values["end"] in (None, *End)
        and isinstance(reports, list)
        and all(isinstance(one, dict) and _has_safe_paths(one) for one in reports)
    )


def _has_safe_paths(report: dict[str, Any]) -> bool:
    """Whether a report's step is a number, and the paths of its checkpoints have no `..`."""
    paths = [report[name] for name in (BEST_CHECKPOINT, LAST_CHECKPOINT) if name in report]
    safe = [isinstance(path, str) and ".." not in path.split("/") for path in paths]
    return isinstance(report.get("step", 0), int | float) and all(safe)


def read_trials(folder: str) -> tuple[list[SavedTrial], list[str]]:
    """The trials that a search's folder still has, in the order in which they were proposed.

    Returns:
        The trials, and the names of damaged files of which there is no undamaged copy.
    """
    files, inner = storage.filesystem(f"{folder}/tune")
    trials: dict[str, SavedTrial] = {}
    damaged: dict[str, str] = {}
    for trial_id, path in _files(files, inner):
        with files.open_input_stream(path) as stream:
            content = bytes(stream.read())
        trial = from_text(content.decode(errors="replace"), folder)
        if trial is None:
            damaged[trial_id] = path
        elif trial_id not in trials or _progress(trials[trial_id]) < _progress(trial):
            trials[trial_id] = trial
    ordered = sorted(trials.values(), key=lambda trial: (trial.number, trial.trial_id))
    for trial in ordered:
        _add_checkpoint_reports(files, f"{inner}/train/{trial.trial_id}", trial, folder)
    lost = [path.rpartition("/tune/")[2] for trial_id, path in damaged.items() if trial_id not in trials]
    return ordered, lost


def _files(files: pafs.FileSystem, tune: str) -> Iterable[tuple[str, str]]:
    """(trial id, path) of every file of a trial."""
    for entry in files.get_file_info(pafs.FileSelector(f"{tune}/trials", allow_not_found=True)):
        if entry.base_name.endswith(".json"):
            yield entry.base_name.removesuffix(".json").partition("-")[2], entry.path
    folders = files.get_file_info(pafs.FileSelector(f"{tune}/train", allow_not_found=True))
    copies = files.get_file_info([f"{entry.path}/{COPY}" for entry in folders])
    for entry, copy in zip(folders, copies, strict=True):
        if copy.type == pafs.FileType.File:
            yield entry.base_name, copy.path


def _progress(trial: SavedTrial) -> tuple[bool, int]:
    return trial.end is not None, len(trial.reports)


def _add_checkpoint_reports(files: pafs.FileSystem, path: str, trial: SavedTrial, folder: str) -> None:
    """Add the reports of checkpoints that were written after the trial's own file."""
    if trial.end is not None:
        return
    for report in complete_reports(files, path):
        if report["step"] > trial.last_report.get("step", 0):
            for name in {BEST_CHECKPOINT, LAST_CHECKPOINT} & report.keys():
                checkpoint = report[name].rpartition("/")[2]  # without its folder, which may have been moved
                report[name] = f"{folder}/tune/train/{trial.trial_id}/{checkpoint}"
            trial.add_report(report)


def _checksum(body: str) -> str:
    return hashlib.blake2b(body.encode(), digest_size=8).hexdigest()


def next_number(trials: Sequence[SavedTrial]) -> int:
    """The number of the next trial to propose."""
    return max((trial.number for trial in trials), default=-1) + 1
