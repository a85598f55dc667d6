"""The messages between the processes of trials and the actors of engines.

A trial's process imports neither torch nor transformers, so this module does not either.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from vlmtune.config.settings import Settings

# Keys of a report's metrics:
# lines for the console that the engine has noted since the last report.
NOTES = "notes"
# why a trial cannot be trained. If the trial raised an exception instead, Tune would start it again.
FAILURE = "failed"
# folder or URI of the checkpoint of the evaluation that counts: the best one with `load_best_model_at_end`,
# else the last one. Ray Train's callback for Tune uses the same key. `best_evaluation.LAST_CHECKPOINT` is
# beside it where the last checkpoint is another one.
BEST_CHECKPOINT = "checkpoint_path"
# how much memory an infeasible trial needed, and how much was free.
REASON = "reason"
# Keys of a trial's Tune config: its searched values by flag name, and its id, which names its folders.
VALUES, TRIAL_ID = "point", "vlmtune_trial"


@dataclass(frozen=True)
class TrialRequest:
    """A trial's request to join an engine.

    Attributes:
        folder: folder or URI of the trial's checkpoints; it resumes from the last one.
        runs_dir: folder or URI of the trial's TensorBoard events.
        on_log: called with the numbers of each logged step; must pickle. None if nobody needs them.
    """

    trial_id: str
    settings: Settings
    folder: str
    runs_dir: str
    on_log: Callable[[dict[str, Any]], None] | None = None


@dataclass(frozen=True)
class TrialReport:
    """The metrics of one evaluation of a trial, and whether it is the trial's final report."""

    metrics: dict[str, Any]
    final: bool


class Availability(NamedTuple):
    """What an engine offers to a trial that wants to join. The largest offer is the best choice.

    Attributes:
        has_trial: the engine has the trial already.
        free_slots: the number of further trials that it has memory for.
    """

    has_trial: bool
    free_slots: int


class UnknownTrialError(Exception):
    """The engine does not know the trial, because it has restarted since. The trial has to join again."""


class NoteLog:
    """Lines that an engine notes for the console. Each is sent once, with a report or by `take_notes`."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.sent = 0

    def add(self, line: str) -> None:
        self.lines.append(line)

    def take_unsent(self) -> list[str]:
        first, self.sent = self.sent, len(self.lines)
        return self.lines[first:]
