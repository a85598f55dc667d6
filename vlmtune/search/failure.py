"""Why no trial of a search completed, and what to try, in one line; the most common reason comes first."""

from collections import Counter
from collections.abc import Sequence

from vlmtune.config.settings import Settings
from vlmtune.search.saved_trials import End
from vlmtune.search.trial_results import FAILED, INFEASIBLE, TrialResult

SMALLER = "a smaller max_length, per_device_train_batch_size or lora_r, or --quantization nf4"


def no_trial_completed(trials: Sequence[TrialResult], settings: Settings, folder: str) -> str:
    """The line for a search in which no trial ran to its end.

    Args:
        folder: output folder of the search.
    """
    counts = Counter(_reason(trial, settings) for trial in trials)
    parts = [_part(reason, count, len(trials)) for reason, count in counts.most_common()]
    resume = f"To continue: python ray_jobs/tune.py --resume {folder}"
    return f"no trial ran to its end: {'; '.join(parts)}. {resume}"


def _part(reason: str, count: int, total: int) -> str:
    who = (
        "the only trial" if total == 1 else f"all {total} trials" if count == total else f"{count} of {total}"
    )
    return f"{who} {reason}"


def _reason(trial: TrialResult, settings: Settings) -> str:
    """What ended a trial, and what to try against it; follows a number of trials in a sentence."""
    if trial.state == INFEASIBLE:
        figures = f" ({trial.error})" if trial.error else ""
        return f"did not fit in memory{figures}: give {SMALLER}"
    if trial.state == FAILED:
        return f"failed: {trial.error}"
    if trial.end is End.DIVERGED:
        rate = settings.training.learning_rate
        searched = settings.search.search_space or {}
        where = "in search_space and in the config" if "learning_rate" in searched else f"below {rate:g}"
        return (
            f"diverged, their loss became NaN, infinite or far larger: give a smaller learning_rate {where}"
        )
    budget = settings.search.time_budget_s
    if budget is not None and trial.end in (End.BUDGET, None):  # None: it had no time to begin
        return f"ended unfinished after --time_budget_s {budget:g}: give more seconds, or no limit"
    return "stopped early, so that none is left: give --early_stopping none or a larger grace_period"
