"""A search's Optuna study as a file in its output folder, which `optuna-dashboard` opens."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

from vlmtune import storage

STUDY_FILE = "study.journal"
STUDY_NAME = "vlmtune"


class StudyFile:
    """Writes a study as an Optuna journal: every finished trial, with values, state and attributes.

    The search itself does not read it (see `SavedTrials`). A resumed search writes the file anew.

    Args:
        path: path or URI of the file.
        metrics: names of the study's objectives.
    """

    def __init__(self, path: str, metrics: Sequence[str]) -> None:
        self.path, self.metrics = path, list(metrics)
        self._folder: str | None = None
        self._copy: optuna.Study | None = None
        self._written: set[int] = set()

    def write(self, study: optuna.Study) -> None:
        """Write the trials that have finished since the last call."""
        copy = self._copy or self._begin(study)
        for trial in study.get_trials(deepcopy=False):
            if trial.state.is_finished() and trial.number not in self._written:
                copy.add_trial(trial)
                self._written.add(trial.number)
        storage.write_text(self.path, self._local.read_text(encoding="utf-8"))

    def __getstate__(self) -> dict[str, Any]:
        """The state without the open file: Ray Tune pickles the searcher that holds this object."""
        return {"path": self.path, "metrics": self.metrics}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    @property
    def _local(self) -> Path:
        # Optuna appends to a journal and locks it. Object stores cannot do that, so it is written here first.
        if self._folder is None:
            self._folder = tempfile.mkdtemp(prefix="study-")
        return Path(self._folder) / STUDY_FILE

    def _begin(self, study: optuna.Study) -> optuna.Study:
        local = str(self._local)
        journal = JournalStorage(JournalFileBackend(local, JournalFileOpenLock(local)))
        self._copy = optuna.create_study(storage=journal, study_name=STUDY_NAME, directions=study.directions)
        self._copy.set_user_attr("metrics", self.metrics)
        return self._copy
