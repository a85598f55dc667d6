"""The seats of an engine's actor: the state of each trial between joining and leaving, and its reports."""

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


class SeatState(Enum):
    """Where a trial is. The first three take a place of the engine."""

    PREPARING = "its slot is being made"
    READY = "it joins before the next round"
    TRAINING = "it takes part in rounds"
    ENDED = "it has left the engine, its reports can be read"
    LEAVING = "it leaves before the next round, its reports are dropped"


TAKES_PLACE = (SeatState.PREPARING, SeatState.READY, SeatState.TRAINING)
HAS_JOINED = (SeatState.READY, SeatState.TRAINING, SeatState.ENDED)


@dataclass
class Seat:
    """One trial in an engine's actor.

    Attributes:
        slot: its slot while it is READY.
        reports: all reports since it joined, by their number from 0.
        next_report: the number that its process asked for last. It has read the reports before it.
        last_polled: when its process called last, in `time.monotonic` seconds.
    """

    trial_id: str
    state: SeatState = SeatState.PREPARING
    slot: Slot | None = None
    reports: list[TrialReport] = field(default_factory=list)
    next_report: int = 0
    last_polled: float = field(default_factory=time.monotonic)

    @property
    def unread(self) -> int:
        return len(self.reports) - self.next_report

    @property
    def waits(self) -> bool:
        """Whether it does not train until its reports are read."""
        return self.unread >= MAX_UNREAD_REPORTS

    @property
    def undecided(self) -> bool:
        """Whether it trains on while the search may still stop it because of its last report."""
        return self.state is SeatState.TRAINING and 0 < self.unread < MAX_UNREAD_REPORTS

    @property
    def abandoned(self) -> bool:
        """Whether it waits for a process that does not come back."""
        waits = self.state is SeatState.TRAINING and self.waits
        return waits and time.monotonic() - self.last_polled > ABANDONED_AFTER_S

    def start_training(self) -> Slot:
        """Change from READY to TRAINING; returns the slot, which has to join the engine."""
        assert self.state is SeatState.READY and self.slot is not None
        slot, self.slot, self.state = self.slot, None, SeatState.TRAINING
        return slot


class Seats:
    """The seats of an engine's actor by trial id.

    Args:
        places: how many trials the engine has memory for.

    Attributes:
        changed: callers hold its lock, also to read or change a seat, and notify it after a change.
    """

    def __init__(self, places: int) -> None:
        self.places = places
        self.changed = Condition()
        self._seats: dict[str, Seat] = {}

    def get(self, trial_id: str) -> Seat | None:
        return self._seats.get(trial_id)

    def joined(self, trial_id: str) -> Seat:
        """The seat of a trial that has joined.

        Raises:
            UnknownTrialError: the trial has not joined, or has left.
        """
        seat = self._seats.get(trial_id)
        if seat is None or seat.state not in HAS_JOINED:
            raise UnknownTrialError(trial_id)
        return seat

    def has_joined(self, trial_id: str) -> bool:
        seat = self._seats.get(trial_id)
        return seat is not None and seat.state in HAS_JOINED

    def is_leaving(self, trial_id: str) -> bool:
        seat = self._seats.get(trial_id)
        return seat is not None and seat.state is SeatState.LEAVING

    @property
    def free_places(self) -> int:
        return self.places - sum(seat.state in TAKES_PLACE for seat in self._seats.values())

    def in_state(self, state: SeatState) -> list[Seat]:
        return [seat for seat in self._seats.values() if seat.state is state]

    def claim(self, trial_id: str) -> Seat | None:
        """The seat of a trial whose slot is to be made, with a place; None if all places are taken."""
        seat = self._seats.get(trial_id)
        if seat is None and self.free_places > 0:
            seat = self._seats[trial_id] = Seat(trial_id)
        return seat

    def seat_slot(self, seat: Seat, slot: Slot) -> bool:
        """Let a trial join before the next round.

        Returns:
            False if `slot` is not needed: the trial has left, or a repeated call was faster.
        """
        if not self._is_preparing(seat):
            return False
        seat.state, seat.slot, seat.last_polled = SeatState.READY, slot, time.monotonic()
        return True

    def seat_ended(self, seat: Seat, last_report: TrialReport) -> None:
        """Give its last report again to a trial that had ended before it joined."""
        if self._is_preparing(seat):
            seat.state, seat.reports = SeatState.ENDED, [last_report]

    def cancel(self, seat: Seat) -> None:
        """Free the place of a trial whose slot could not be made."""
        if self._is_preparing(seat):
            self.remove(seat.trial_id)

    def end(self, trial_id: str) -> None:
        """Mark a trial that the engine has removed. Its last report may still come."""
        seat = self._seats.get(trial_id)
        if seat is not None and seat.state is SeatState.TRAINING:
            seat.state = SeatState.ENDED

    def leave(self, trial_id: str) -> Slot | None:
        """Remove a trial, or let it leave before the next round; returns its slot if it was READY."""
        seat = self._seats.get(trial_id)
        if seat is None:
            return None
        if seat.state in (SeatState.TRAINING, SeatState.LEAVING):
            seat.state = SeatState.LEAVING
            return None
        self.remove(trial_id)
        return seat.slot if seat.state is SeatState.READY else None

    def remove(self, trial_id: str) -> None:
        self._seats.pop(trial_id, None)

    def _is_preparing(self, seat: Seat) -> bool:
        return self._seats.get(seat.trial_id) is seat and seat.state is SeatState.PREPARING
