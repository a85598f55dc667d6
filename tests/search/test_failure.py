"""Why no trial completed: the one true reason, the commonest first."""

from typing import Any

from vlmtune.config.settings import Settings
from vlmtune.search.failure import no_trial_completed
from vlmtune.search.saved_trials import End
from vlmtune.search.trial_results import FAILED, INFEASIBLE, PRUNED, TrialResult


def ended(state: str, end: End, error: str | None = None) -> TrialResult:
    return TrialResult("a", {}, state, {}, error, end=end)


def line(*trials: TrialResult, **flags: Any) -> str:
    text = no_trial_completed(trials, Settings.from_flags(flags), "/out")
    assert "\n" not in text
    assert text.endswith("To continue: python ray_jobs/tune.py --resume /out")
    return text


def test_each_reason_names_what_to_try() -> None:
    diverged = line(*[ended(PRUNED, End.DIVERGED)] * 3, learning_rate=0.5)
    assert diverged.startswith("no trial ran to its end: all 3 trials diverged")
    assert "give a smaller learning_rate below 0.5" in diverged
    budget = line(ended(PRUNED, End.BUDGET), time_budget_s=60)
    assert "the only trial ended unfinished after --time_budget_s 60" in budget
    lack = "2.00 GiB more were needed, 1.00 GiB of the GPU's 79.00 GiB were free"
    memory = line(*[ended(INFEASIBLE, End.LAST_REPORT, lack)] * 2)
    assert f"all 2 trials did not fit in memory ({lack}): give a smaller max_length" in memory
    assert "--quantization nf4" in memory
    assert "--early_stopping none" in line(ended(PRUNED, End.STOPPED))


def test_the_commonest_reason_comes_first() -> None:
    failed = ended(FAILED, End.ERROR, "no such layer")
    text = line(failed, ended(PRUNED, End.DIVERGED), ended(PRUNED, End.DIVERGED))
    assert text.index("2 of 3 diverged") < text.index("1 of 3 failed: no such layer")
