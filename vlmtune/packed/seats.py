"""The trials of an engine's actor: where each one is between joining and leaving, and its unread reports."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from enum import Enum
from threading import Condition
from typing import TYPE_CHECKING

from vlmtune.packed.messages import TrialReport, UnknownTrialError

if TYPE_CHECKING:
    from vlmtune.packed.slot import Slot

# Unread reports with which a trial waits. It trains on while the search decides about its last report.
MAX_UNREAD_REPORTS = 2
# After this time without a call for a waiting trial, its process is gone for good.
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
        slot: what joins the engine, while READY.
        reports: all since it joined, by their number from 0.
        next_report: the number that its process asked for last; it has read those before.
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
        """Whether it trains no further until its reports are read."""
        return self.unread >= MAX_UNREAD_REPORTS

    @property
    def undecided(self) -> bool:
        """Whether it trains on though the search may still stop it for its last report."""
        return self.state is SeatState.TRAINING and 0 < self.unread < MAX_UNREAD_REPORTS

    @property
    def abandoned(self) -> bool:
        """Whether it waits for a process that does not come back."""
        waits = self.state is SeatState.TRAINING and self.waits
        return waits and time.monotonic() - self.last_polled > ABANDONED_AFTER_S

    def start_training(self) -> Slot:
        """Leave READY; returns the slot that joins the engine."""
        assert self.state is SeatState.READY and self.slot is not None
        slot, self.slot, self.state = self.slot, None, SeatState.TRAINING
        return slot


class Seats:
    """The seats of an engine's actor by trial id.

    Args:
        places: how many trials the engine has memory for.

    Attributes:
        changed: its lock is held for every call and while a seat is changed; then it is notified.
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
            UnknownTrialError: it has not.
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
        """The place of a trial whose slot is then made; None if it has none and all are taken."""
        seat = self._seats.get(trial_id)
        if seat is None and self.free_places > 0:
            seat = self._seats[trial_id] = Seat(trial_id)
        return seat

    def seat_slot(self, seat: Seat, slot: Slot) -> bool:
        """Let a trial join before the next round.

        Returns False where it has left meanwhile, or where a repeated call was faster; `slot` is not needed.
        """
        if not self._is_preparing(seat):
            return False
        seat.state, seat.slot, seat.last_polled = SeatState.READY, slot, time.monotonic()
        return True

    def seat_ended(self, seat: Seat, last_report: TrialReport) -> None:
        """Give the last report once more to a trial that ended before it joined."""
        if self._is_preparing(seat):
            seat.state, seat.reports = SeatState.ENDED, [last_report]

    def cancel(self, seat: Seat) -> None:
        """Free the place of a trial whose slot could not be made."""
        if self._is_preparing(seat):
            self.remove(seat.trial_id)

    def end(self, trial_id: str) -> None:
        """The engine has removed a trial, whose last report may still come."""
        seat = self._seats.get(trial_id)
        if seat is not None and seat.state is SeatState.TRAINING:
            seat.state = SeatState.ENDED

    def leave(self, trial_id: str) -> Slot | None:
        """Let a trial go whose process has left; returns its slot if that has not joined the engine."""
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
