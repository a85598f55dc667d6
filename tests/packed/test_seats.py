"""Where a trial is between joining an engine and leaving it."""

from typing import Any

import pytest

from vlmtune.packed.messages import TrialReport, UnknownTrialError
from vlmtune.packed.seats import MAX_UNREAD_REPORTS, Seat, Seats, SeatState

SLOT: Any = object()
REPORT = TrialReport({"step": 2}, last=False)


def claim(seats: Seats, name: str) -> Seat:
    seat = seats.claim(name)
    assert seat is not None
    return seat


def training(seats: Seats, name: str) -> Seat:
    seat = claim(seats, name)
    assert seats.seat_slot(seat, SLOT)
    assert seat.start_training() is SLOT
    return seat


def test_a_trial_goes_through_its_states() -> None:
    seats = Seats(1)
    seat = claim(seats, "one")
    assert seat.state is SeatState.PREPARING
    with pytest.raises(UnknownTrialError):
        seats.joined("one")
    assert seats.seat_slot(seat, SLOT)
    assert seat.state is SeatState.READY
    assert seats.joined("one") is seat
    assert seat.start_training() is SLOT
    assert (seat.state, seat.slot) == (SeatState.TRAINING, None)
    assert seats.free_places == 0
    seats.end("one")
    assert seat.state is SeatState.ENDED
    assert seats.joined("one") is seat, "its reports can be read"
    assert seats.free_places == 1
    assert seats.leave("one") is None
    assert seats.get("one") is None


def test_a_trial_that_trains_leaves_before_the_next_round() -> None:
    seats = Seats(1)
    seat = training(seats, "one")
    for _ in range(2):  # Ray may repeat a call
        assert seats.leave("one") is None
        assert seat.state is SeatState.LEAVING
    assert seats.is_leaving("one")
    assert seats.free_places == 1
    seats.end("one")
    assert seat.state is SeatState.LEAVING
    with pytest.raises(UnknownTrialError):
        seats.joined("one")


def test_a_trial_that_is_ready_leaves_at_once() -> None:
    seats = Seats(1)
    assert seats.seat_slot(claim(seats, "one"), SLOT)
    assert seats.leave("one") is SLOT
    assert seats.get("one") is None
    assert seats.leave("one") is None


def test_a_trial_that_leaves_while_it_is_prepared_does_not_join() -> None:
    seats = Seats(1)
    first = claim(seats, "one")
    seats.leave("one")
    assert not seats.seat_slot(first, SLOT)
    second = claim(seats, "one")
    assert not seats.seat_slot(first, SLOT), "this is another seat of the same trial"
    seats.cancel(first)
    assert seats.get("one") is second


def test_a_repeated_call_shares_the_place_and_the_faster_one_joins() -> None:
    seats = Seats(1)
    seat = claim(seats, "one")
    assert seats.claim("one") is seat
    assert seats.claim("two") is None
    assert seats.seat_slot(seat, SLOT)
    assert not seats.seat_slot(seat, SLOT)
    seats.cancel(seat)
    assert seats.get("one") is seat, "what has joined is not cancelled"


def test_a_trial_that_cannot_be_prepared_frees_its_place() -> None:
    seats = Seats(1)
    seats.cancel(claim(seats, "one"))
    assert seats.free_places == 1
    assert seats.get("one") is None


def test_a_trial_that_had_ended_before_takes_no_place() -> None:
    seats = Seats(1)
    seats.seat_ended(claim(seats, "one"), REPORT)
    assert seats.joined("one").reports == [REPORT]
    assert seats.free_places == 1


def test_a_trial_waits_until_its_reports_are_read() -> None:
    seat = training(Seats(1), "one")
    assert (seat.undecided, seat.waits) == (False, False)
    seat.reports.append(REPORT)
    assert (seat.undecided, seat.waits) == (True, False)
    seat.reports += [REPORT] * (MAX_UNREAD_REPORTS - 1)
    assert (seat.undecided, seat.waits) == (False, True)
    seat.next_report = 1
    assert (seat.undecided, seat.waits) == (True, False)
    seat.next_report = 2
    assert (seat.undecided, seat.waits) == (False, False)


def test_only_a_waiting_trial_is_abandoned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlmtune.packed.seats.ABANDONED_AFTER_S", -1.0)
    seats = Seats(1)
    seat = training(seats, "one")
    assert not seat.abandoned
    seat.reports += [REPORT] * MAX_UNREAD_REPORTS
    assert seat.abandoned
    seats.end("one")
    assert not seat.abandoned, "it takes no place"
