"""How far a search is, on made-up rows of its table."""

from typing import Any

import pytest

from vlmtune.config.search_options import SearchSettings
from vlmtune.search.search_progress import ExpectedSteps, SearchProgress, longest_queue


def row(state: str, step: int | None = None) -> dict[str, Any]:
    return {"state": state, **({} if step is None else {"step": step, "max_steps": 240})}


def test_the_line_counts_trials_and_tells_the_time_left() -> None:
    now = [0.0]
    progress = SearchProgress(16, at_once=4, clock=lambda: now[0])
    rows = [row("running")] * 4
    progress.start(rows)
    assert progress.line(rows, None) == "0/16 trials" and progress.cost(rows, "GPU") is None
    now[0] = 120.0
    rows = [row("complete", 240)] * 12 + [row("running", 0)]
    assert progress.line(rows, "0.013") == "12/16 trials, best 0.013, about 40 s left"
    assert progress.cost(rows, "GPU") == "16 trials x 240 steps, about 3 minutes on this GPU"
    assert progress.line([row("complete", 240)] * 16, "0.01") == "16/16 trials, best 0.01"


def test_trials_that_ended_before_a_resume_took_no_time_now() -> None:
    now = [0.0]
    progress = SearchProgress(16, clock=lambda: now[0])
    rows = [row("complete", 240)] * 8
    progress.start([*rows, row("running")])
    now[0] = 100.0
    found = progress.seconds([*rows, row("complete", 240), row("running", 0)])
    assert found is not None and found[0] == pytest.approx(700.0)


def expected(early_stopping: str, grace_period: float, reduction_factor: int) -> ExpectedSteps:
    values: Any = {"early_stopping": early_stopping, "grace_period": grace_period}
    return ExpectedSteps.of(SearchSettings(**values, reduction_factor=reduction_factor))


def test_early_stopping_is_expected() -> None:
    assert expected("none", 0.5, 3).left() == 1.0
    assert expected("asha", 0.5, 3).left() == pytest.approx(0.5 + 0.5 / 3)
    assert expected("asha", 0.1, 3).left() == pytest.approx(0.1 + 0.2 / 3 + 0.6 / 9 + 0.1 / 27)
    assert expected("asha", 1.0, 2).left() == 1.0


def test_a_trial_that_has_passed_a_rung_is_expected_to_go_on() -> None:
    assert expected("asha", 0.5, 3).left(0.4) == pytest.approx(0.1 + 0.5 / 3)
    assert expected("asha", 0.5, 3).left(0.6) == pytest.approx(0.4)
    assert expected("none", 0.5, 3).left(0.6) == pytest.approx(0.4)


def test_one_engine_trains_the_last_trial_while_the_others_wait() -> None:
    assert longest_queue([1.0, 1.0, 1.0], 2) == 2.0
    assert longest_queue([0.5, 1.0, 0.5], 2) == 1.0
    assert longest_queue([], 2) == 0.0


def test_the_runs_that_confirm_the_best_are_counted_in() -> None:
    now = [0.0]
    progress = SearchProgress(16, at_once=2, confirmations=6, clock=lambda: now[0])
    rows = [row("running")] * 2
    progress.start(rows)
    now[0] = 80.0
    rows = [row("complete", 240)] * 8
    assert progress.seconds(rows) == (pytest.approx(80.0 + 60.0), pytest.approx(220.0))
    assert progress.cost(rows, "CPU") == (
        "16 trials x 240 steps and 6 to confirm the best, about 4 minutes on this CPU"
    )


@pytest.mark.parametrize("seed", range(3))
def test_after_a_tenth_of_a_search_the_estimate_is_within_a_factor_of_1_5(seed: int) -> None:
    """A search of 16 trials, four at a time, of which two thirds are stopped at half."""
    now = [30.0]
    progress = SearchProgress(16, expected("asha", 0.5, 3), at_once=4, clock=lambda: now[0])
    stops = [240 if (number + seed) % 3 == 0 else 120 for number in range(16)]
    total_steps = sum(stops)
    rows = [row("running") for _ in range(4)]
    progress.start(rows)
    for part in range(1, 5):
        for one in rows:
            one |= {"step": 10 * part, "max_steps": 240}
        now[0] += 4 * 10 * 0.1
    done = 4 * 40
    found = progress.seconds(rows)
    assert found is not None and done <= 0.15 * total_steps
    true_left = (total_steps - done) * 0.1
    assert true_left / 1.5 <= found[0] <= true_left * 1.5
