"""The trials that an engine's actor knows, each with its phase from joining to leaving and its reports.

A trial's process polls: it asks for the trial's reports by their numbers, and Ray Tune decides about each one
before the process asks for the next. With one unread report a trial trains on while the search decides. With
`MAX_UNREAD_REPORTS` it is paused. If the process of a paused trial no longer polls, the trial is abandoned.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from enum import Enum
from threading import Condition
from typing import TYPE_CHECKING

from vlmtune.packed.messages import TrialReport, UnknownTrialError

if TYPE_CHECKING:
    from vlmtune.packed.slot import Slot

# A trial with this many unread reports is paused. With fewer, it trains on while the search decides about it.
MAX_UNREAD_REPORTS = 2
# A paused trial whose process has not called for this many seconds is dropped: the process is gone.
ABANDONED_AFTER_S = 600.0


class TrialPhase(Enum):
    """The phase of a trial in an engine. In the first three, it takes one of the engine's slots."""

    PREPARING = "its slot is being made"
    READY = "its slot is made; the engine takes it in before the next round"
    TRAINING = "it takes part in rounds"
    FINISHED = "its training has ended; its final report can be read"
    LEAVING = "its process has asked to remove it; the engine does so before the next round"


HOLDS_SLOT = (TrialPhase.PREPARING, TrialPhase.READY, TrialPhase.TRAINING)
CAN_BE_POLLED = (TrialPhase.READY, TrialPhase.TRAINING, TrialPhase.FINISHED)


@dataclass
class RegisteredTrial:
    """One trial in an engine's actor.

    Attributes:
        slot: the trial's slot while it is READY, before the engine has it.
        reports: all reports since the trial joined; the index is the report's number.
        next_report: the number of the report that the trial's process asked for last. It has read all before.
        last_polled: when the trial's process called last, in `time.monotonic` seconds.
    """

    trial_id: str
    phase: TrialPhase = TrialPhase.PREPARING
    slot: Slot | None = None
    reports: list[TrialReport] = field(default_factory=list)
    next_report: int = 0
    last_polled: float = field(default_factory=time.monotonic)

    @property
    def unread(self) -> int:
        return len(self.reports) - self.next_report

    @property
    def is_paused(self) -> bool:
        """Whether it takes part in no round until its process reads its reports."""
        return self.unread >= MAX_UNREAD_REPORTS

    @property
    def awaits_decision(self) -> bool:
        """Whether it trains although the search has yet to decide, on its last report, whether to stop it."""
        return self.phase is TrialPhase.TRAINING and 0 < self.unread < MAX_UNREAD_REPORTS

    @property
    def is_abandoned(self) -> bool:
        """Whether it is paused and its process has gone."""
        paused = self.phase is TrialPhase.TRAINING and self.is_paused
        return paused and time.monotonic() - self.last_polled > ABANDONED_AFTER_S

    def start_training(self) -> Slot:
        """Change from READY to TRAINING; returns the slot, for `Engine.join`."""
        assert self.phase is TrialPhase.READY and self.slot is not None
        slot, self.slot, self.phase = self.slot, None, TrialPhase.TRAINING
        return slot


class TrialRegistry:
    """The trials of an engine's actor by their id.

    Args:
        max_trials: the number of trials that the engine has memory for.

    Attributes:
        changed: callers hold its lock while they read or change the registry or a trial, and notify it after
            a change.
    """

    def __init__(self, max_trials: int) -> None:
        self.max_trials = max_trials
        self.changed = Condition()
        self._trials: dict[str, RegisteredTrial] = {}

    def get(self, trial_id: str) -> RegisteredTrial | None:
        return self._trials.get(trial_id)

    def get_polled(self, trial_id: str) -> RegisteredTrial:
        """A trial whose process may ask for reports.

        Raises:
            UnknownTrialError: the trial has not joined, or has left.
        """
        trial = self._trials.get(trial_id)
        if trial is None or trial.phase not in CAN_BE_POLLED:
            raise UnknownTrialError(trial_id)
        return trial

    def can_be_polled(self, trial_id: str) -> bool:
        """Whether the trial has joined and not left, so that its process may ask for reports."""
        trial = self._trials.get(trial_id)
        return trial is not None and trial.phase in CAN_BE_POLLED

    def is_leaving(self, trial_id: str) -> bool:
        trial = self._trials.get(trial_id)
        return trial is not None and trial.phase is TrialPhase.LEAVING

    @property
    def free_slots(self) -> int:
        return self.max_trials - sum(trial.phase in HOLDS_SLOT for trial in self._trials.values())

    def in_phase(self, phase: TrialPhase) -> list[RegisteredTrial]:
        return [trial for trial in self._trials.values() if trial.phase is phase]

    def reserve_slot(self, trial_id: str) -> RegisteredTrial | None:
        """Register a trial whose slot is yet to be made; None if the engine has no free slot."""
        trial = self._trials.get(trial_id)
        if trial is None and self.free_slots > 0:
            trial = self._trials[trial_id] = RegisteredTrial(trial_id)
        return trial

    def set_ready(self, trial: RegisteredTrial, slot: Slot) -> bool:
        """Give a trial its slot, so that the engine takes it in before the next round.

        Returns:
            False if `slot` is not needed, because the trial has left, or a repeated call has made its slot.
        """
        if not self._is_preparing(trial):
            return False
        trial.phase, trial.slot, trial.last_polled = TrialPhase.READY, slot, time.monotonic()
        return True

    def restore_finished(self, trial: RegisteredTrial, final_report: TrialReport) -> None:
        """Mark a trial that had ended before it joined as FINISHED. Its final report can be read again."""
        if self._is_preparing(trial):
            trial.phase, trial.reports = TrialPhase.FINISHED, [final_report]

    def cancel(self, trial: RegisteredTrial) -> None:
        """Forget a trial whose slot could not be made."""
        if self._is_preparing(trial):
            self.remove(trial.trial_id)

    def mark_finished(self, trial_id: str) -> None:
        """Mark a trial that the engine has removed as FINISHED. Its final report may still come."""
        trial = self._trials.get(trial_id)
        if trial is not None and trial.phase is TrialPhase.TRAINING:
            trial.phase = TrialPhase.FINISHED

    def leave(self, trial_id: str) -> Slot | None:
        """Remove a trial; if it is TRAINING, the engine does so before the next round.

        Returns:
            The slot of a READY trial, which the caller has to close; None for other trials.
        """
        trial = self._trials.get(trial_id)
        if trial is None:
            return None
        if trial.phase in (TrialPhase.TRAINING, TrialPhase.LEAVING):
            trial.phase = TrialPhase.LEAVING
            return None
        self.remove(trial_id)
        return trial.slot if trial.phase is TrialPhase.READY else None

    def remove(self, trial_id: str) -> None:
        self._trials.pop(trial_id, None)

    def _is_preparing(self, trial: RegisteredTrial) -> bool:
        return self._trials.get(trial.trial_id) is trial and trial.phase is TrialPhase.PREPARING
