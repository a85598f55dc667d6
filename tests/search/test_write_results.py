"""Which trial is the baseline, and which numbers are the run's own. test_run_search.py runs searches."""

import pytest
from search_kit import trial

from vlmtune.config.settings import Settings
from vlmtune.search.space import Space
from vlmtune.search.trial_results import PRUNED, TrialResult
from vlmtune.search.write_results import baseline_trial, own_metrics


@pytest.fixture
def space() -> Space:
    settings = Settings.from_flags({"learning_rate": 1e-3, "lora_r": 8})
    return Space.parse(
        {"learning_rate": {"loguniform": [1e-4, 1e-2]}, "lora_r": {"choice": [4, 8]}, "lora_alpha": 16},
        settings,
    )


def with_values(result: TrialResult, **values: object) -> TrialResult:
    return TrialResult(result.trial_id, dict(values), result.state, result.metrics)


def test_the_baseline_is_found_by_its_values_wherever_it_stands(space: Space) -> None:
    other = with_values(trial(0, 2e-3), learning_rate=2e-3, lora_r=8, lora_alpha=16)
    baseline = with_values(trial(1, 1e-3), learning_rate=1e-3, lora_r=8, lora_alpha=16)
    assert baseline_trial([other, baseline], space) is baseline
    assert baseline_trial([other], space) is None
    stopped = with_values(trial(1, 1e-3, PRUNED), learning_rate=1e-3, lora_r=8, lora_alpha=16)
    assert baseline_trial([stopped], space) is None


def test_tunes_bookkeeping_is_left_out_of_the_metrics() -> None:
    own = {"eval_loss": 1.0, "eval_seconds": 2.0, "exact_match": 0.5, "rows_per_second": 3.0, "step": 8}
    assert own_metrics({**own, "training_iteration": 4, "trial_id": "a", "time_total_s": 9.0}) == own
