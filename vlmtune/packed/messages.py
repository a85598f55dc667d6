"""The messages between trials and engines.

Both sides import this module, so it imports neither torch nor transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from vlmtune.config.settings import Settings

# In a report's metrics: lines for the console that its engine has noted since the last report.
NOTES = "notes"
# In a report's metrics: why a trial cannot be trained. An exception would make Tune start the trial again,
# as it does for one whose process died.
FAILURE = "failed"
# In a report's metrics: folder or URI of the checkpoint that was taken with it. Ray Train's callback for Tune
# uses the same key.
CHECKPOINT = "checkpoint_path"
REASON = "reason"  # in a report's metrics: what an infeasible trial needed, and what there was
# In the Tune config of a trial: its searched values by flag name, and the name of its folders.
VALUES, TRIAL_ID = "point", "vlmtune_trial"


@dataclass(frozen=True)
class TrialRequest:
    """What an engine needs to know of a trial that joins.

    Attributes:
        folder: folder or URI of its checkpoints; it resumes from the last one.
        runs_dir: folder or URI of its TensorBoard events.
        on_log: called with the numbers of each logged step; must pickle.
    """

    trial_id: str
    settings: Settings
    folder: str
    runs_dir: str
    on_log: Callable[[dict[str, Any]], None] | None = None


@dataclass(frozen=True)
class TrialReport:
    """The metrics of one evaluation of a trial, and whether the trial has ended with it."""

    metrics: dict[str, Any]
    last: bool


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
    """Lines that an engine notes for the console. Each is sent once."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.sent = 0

    def add(self, line: str) -> None:
        self.lines.append(line)

    def take_unsent(self) -> list[str]:
        first, self.sent = self.sent, len(self.lines)
        return self.lines[first:]
