"""The thread of an engine's actor: what it waits for between rounds."""

import time
from functools import partial
from types import SimpleNamespace
from typing import Any

from vlmtune.background import in_background
from vlmtune.packed.engine_loop import EngineLoop
from vlmtune.packed.messages import NoteLog, TrialReport
from vlmtune.packed.seats import Seat, Seats, SeatState

REPORT = TrialReport({"step": 2}, last=False)


def training(seats: Seats, name: str, **changes: Any) -> Seat:
    seat = seats.claim(name)
    assert seat is not None
    seat.state = SeatState.TRAINING
    for attribute, value in changes.items():
        setattr(seat, attribute, value)
    return seat


def test_the_search_has_a_moment_to_stop_trials() -> None:
    seats = Seats(3)
    engine: Any = SimpleNamespace(slots=dict.fromkeys(("one", "two", "gone")), round_seconds=60.0)
    loop = EngineLoop(seats, NoteLog(), early_stopping=True)
    one, two = (training(seats, name, reports=[REPORT]) for name in ("one", "two"))
    gone = training(seats, "gone", reports=[REPORT], next_report=1)
    waiting = in_background(partial(loop._wait_for_search, engine), "waiting")
    with seats.changed:
        one.next_report = 1
        seats.changed.notify_all()
    time.sleep(0.1)
    assert not waiting.done(), "nothing is known of the other"
    with seats.changed:
        seats.leave("two")
        seats.changed.notify_all()
    waiting.result(10)
    assert two.state is SeatState.LEAVING
    gone.reports, gone.next_report = [REPORT, REPORT], 0
    started = time.monotonic()
    loop._wait_for_search(engine)  # it waits itself, so there are no rows of it to wait for
    assert time.monotonic() - started < 10
    engine.round_seconds, one.next_report = 0.2, 0
    started = time.monotonic()
    loop._wait_for_search(engine)
    assert 0.03 < time.monotonic() - started < 10, "a sixth of it: half of the rows of one of three trials"


def test_a_report_of_a_trial_that_has_left_is_dropped() -> None:
    seats = Seats(1)
    loop = EngineLoop(seats, NoteLog(), early_stopping=True)
    seat = training(seats, "one")
    loop.deliver("one", REPORT)
    seats.leave("one")
    loop.deliver("one", REPORT)
    loop.deliver("unknown", REPORT)
    assert seat.reports == [REPORT]
