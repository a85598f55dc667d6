"""How far a search is, on made-up rows of its table."""

from typing import Any

import pytest

from vlmtune.search.search_progress import SearchProgress, expected_fraction


def row(state: str, step: int | None = None) -> dict[str, Any]:
    return {"state": state, **({} if step is None else {"step": step, "max_steps": 240})}


def test_the_line_counts_trials_and_tells_the_time_left() -> None:
    now = [0.0]
    progress = SearchProgress(16, clock=lambda: now[0])
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


def test_early_stopping_is_expected() -> None:
    assert expected_fraction("none", 0.5, 3) == 1.0
    assert expected_fraction("asha", 0.5, 3) == pytest.approx(0.5 + 0.5 / 3)
    assert expected_fraction("asha", 0.1, 3) == pytest.approx(0.1 + 0.2 / 3 + 0.6 / 9 + 0.1 / 27)
    assert expected_fraction("asha", 1.0, 2) == 1.0


@pytest.mark.parametrize("seed", range(3))
def test_after_a_tenth_of_a_search_the_estimate_is_within_a_factor_of_1_5(seed: int) -> None:
    """A search of 16 trials, four at a time, of which two thirds are stopped at half."""
    now = [30.0]
    share = expected_fraction("asha", 0.5, 3)
    progress = SearchProgress(16, share, clock=lambda: now[0])
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
