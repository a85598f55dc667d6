"""Estimates of the time that is left."""

import pytest

from vlmtune.progress import Estimate, duration_text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "1 s"), (40, "40 s"), (89, "89 s"), (660, "11 minutes"), (7800, "2 h 10 min"), (4e5, "111 h")],
)
def test_durations_are_words(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text


def test_time_counts_from_the_first_call_and_work_before_it_does_not() -> None:
    clock = iter([100.0, 110.0, 111.0, 130.0])
    estimate = Estimate(lambda: next(clock))
    assert estimate.text(50, 100) == "", "resumed at 50: nothing is known of the pace"
    assert estimate.left(60, 100) == pytest.approx(40.0)
    assert estimate.left(50.5, 100) is None, "too little to tell"
    assert estimate.text(100, 100) == "", "the end needs no estimate"


def test_a_tenth_of_a_steady_run_tells_the_rest() -> None:
    now = [0.0]
    estimate = Estimate(lambda: now[0])
    for step in range(1, 25):
        now[0] = 60 + 0.5 * step  # a minute of loading before the first step
        left = estimate.left(step, 240)
    assert left == pytest.approx(0.5 * (240 - 24), rel=0.05)
