"""Training time of a search, and what early stopping saved."""

import pytest
from search_kit import trial

from vlmtune.search.report.training_time import elapsed_seconds, format_seconds, training_seconds
from vlmtune.search.trial_results import FAILED, PRUNED


def test_pruning_saves_what_a_trial_had_left_at_its_own_pace() -> None:
    complete = [trial(number, 1e-3) for number in range(3)]  # 8 steps in 40 s
    pruned = [trial(number, 1e-3, PRUNED) for number in range(5)]  # 2 of 8 steps in 10 s
    assert training_seconds([*complete, *pruned, trial(8, 1e-3, FAILED)]) == (3 * 40 + 5 * 10, 5 * 10, 5 * 30)


def test_time_elapses_from_the_first_start_to_the_last_report() -> None:
    trials = [
        trial(0, 1e-3, timestamp=140, time_total_s=40.0),
        trial(1, 1e-3, timestamp=190, time_total_s=70.0),
        trial(2, 1e-3, FAILED),
    ]
    assert elapsed_seconds(trials) == 90
    assert elapsed_seconds(trials[2:]) is None


@pytest.mark.parametrize(("seconds", "text"), [(119, "119 s"), (150, "2.5 min"), (9000, "2.5 h")])
def test_times_are_short(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text
