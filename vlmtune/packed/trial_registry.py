"""The trials that an engine's actor knows: the phase of each between joining and leaving, and its reports."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from enum import Enum
from threading import Condition
from typing import TYPE_CHECKING

from vlmtune.packed.messages import TrialReport, UnknownTrialError

if TYPE_CHECKING:
    from vlmtune.packed.slot import Slot

# A trial with this many unread reports is paused. With fewer it trains while the search decides.
MAX_UNREAD_REPORTS = 2
# A paused trial for which nobody has called for this many seconds is dropped: its process is gone.
ABANDONED_AFTER_S = 600.0


class TrialPhase(Enum):
    """What a trial does in an engine. In the first three phases it takes one of the engine's places."""

    PREPARING = "its slot is being made"
    READY = "it joins before the next round"
    TRAINING = "it takes part in rounds"
    FINISHED = "its training has ended, its last report can be read"
    LEAVING = "its process wants it gone: the engine drops it before the next round"


HOLDS_SLOT = (TrialPhase.PREPARING, TrialPhase.READY, TrialPhase.TRAINING)
CAN_BE_POLLED = (TrialPhase.READY, TrialPhase.TRAINING, TrialPhase.FINISHED)


@dataclass
class RegisteredTrial:
    """What an engine's actor knows of one trial.

    Attributes:
        slot: its slot while it is READY: made, and not yet handed to the engine.
        reports: all reports since it joined, by their number from 0.
        next_report: the number that its process asked for last. It has read the reports before it.
        last_polled: when its process called last, in `time.monotonic` seconds.
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
        """Whether it takes part in no round until its reports are read."""
        return self.unread >= MAX_UNREAD_REPORTS

    @property
    def awaits_decision(self) -> bool:
        """Whether it trains while the search may still stop it because of its last report."""
        return self.phase is TrialPhase.TRAINING and 0 < self.unread < MAX_UNREAD_REPORTS

    @property
    def is_abandoned(self) -> bool:
        """Whether it is paused for a process that does not come back."""
        paused = self.phase is TrialPhase.TRAINING and self.is_paused
        return paused and time.monotonic() - self.last_polled > ABANDONED_AFTER_S

    def start_training(self) -> Slot:
        """Change from READY to TRAINING; returns the slot, which has to join the engine."""
        assert self.phase is TrialPhase.READY and self.slot is not None
        slot, self.slot, self.phase = self.slot, None, TrialPhase.TRAINING
        return slot


class TrialRegistry:
    """The trials of an engine's actor by their id.

    Args:
        max_trials: how many trials the engine has memory for.

    Attributes:
        changed: callers hold its lock, also to read or change a trial, and notify it after a change.
    """

    def __init__(self, max_trials: int) -> None:
        self.max_trials = max_trials
        self.changed = Condition()
        self._trials: dict[str, RegisteredTrial] = {}

    def get(self, trial_id: str) -> RegisteredTrial | None:
        return self._trials.get(trial_id)

    def joined(self, trial_id: str) -> RegisteredTrial:
        """A trial that has joined.

        Raises:
            UnknownTrialError: the trial has not joined, or has left.
        """
        trial = self._trials.get(trial_id)
        if trial is None or trial.phase not in CAN_BE_POLLED:
            raise UnknownTrialError(trial_id)
        return trial

    def has_joined(self, trial_id: str) -> bool:
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
        """Reserve a slot for a trial, which is yet to be made; None if the engine has no free one."""
        trial = self._trials.get(trial_id)
        if trial is None and self.free_slots > 0:
            trial = self._trials[trial_id] = RegisteredTrial(trial_id)
        return trial

    def set_ready(self, trial: RegisteredTrial, slot: Slot) -> bool:
        """Let a trial join before the next round.

        Returns:
            False if `slot` is not needed: the trial has left, or a repeated call was faster.
        """
        if not self._is_preparing(trial):
            return False
        trial.phase, trial.slot, trial.last_polled = TrialPhase.READY, slot, time.monotonic()
        return True

    def restore_finished(self, trial: RegisteredTrial, last_report: TrialReport) -> None:
        """Mark a trial that had ended before it joined as finished, with its last report to be read again."""
        if self._is_preparing(trial):
            trial.phase, trial.reports = TrialPhase.FINISHED, [last_report]

    def cancel(self, trial: RegisteredTrial) -> None:
        """Forget a trial whose slot could not be made."""
        if self._is_preparing(trial):
            self.remove(trial.trial_id)

    def mark_finished(self, trial_id: str) -> None:
        """Mark a trial that the engine has removed as finished. Its last report may still come."""
        trial = self._trials.get(trial_id)
        if trial is not None and trial.phase is TrialPhase.TRAINING:
            trial.phase = TrialPhase.FINISHED

    def leave(self, trial_id: str) -> Slot | None:
        """Remove a trial, or let it leave before the next round; returns its slot if it was READY."""
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
