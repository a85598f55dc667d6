"""How much each searched option mattered, by Optuna's evaluator of importance."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

from vlmtune.search.report.plot import LOG_FROM
from vlmtune.search.trial_results import COMPLETE, TrialResult

ENOUGH_TRIALS = 8  # the shares from fewer trials are little more than chance


def importances(
    trials: Sequence[TrialResult],
    curves: Mapping[str, Sequence[tuple[float, float]]],
    names: Sequence[str],
    metric: str,
    mode: str,
) -> tuple[dict[str, float], str] | None:
    """The share of each option in the differences between trials, and what was compared, in words.

    Compared are the trials' final metrics if enough trials completed, otherwise their first evaluations,
    which trials that were stopped early have too.

    Args:
        curves: (step, metric) of each report of a trial, by trial_id.
        names: the options that are drawn. Computed options are left out: they depend on the drawn ones.

    Returns:
        Shares by option, the largest first, and the description; None if there are too few trials.
    """
    final = [(one, one.metric(metric)) for one in trials if one.state == COMPLETE]
    first = [(one, curves[one.trial_id][0][1]) for one in trials if curves.get(one.trial_id)]
    first_evaluation = f"{metric} at a trial's first evaluation"
    for measured, description in ((final, f"{metric} at the end"), (first, first_evaluation)):
        usable = [
            (one, value)
            for one, value in measured
            if math.isfinite(value) and all(name in one.values for name in names)
        ]
        varying = [name for name in names if len({_plain(one.values[name]) for one, _ in usable}) > 1]
        if len(usable) >= ENOUGH_TRIALS and varying:
            return _evaluate(usable, varying, mode), f"{description}, {len(usable)} trials"
    return None


def _evaluate(
    measured: Sequence[tuple[TrialResult, float]], names: Sequence[str], mode: str
) -> dict[str, float]:
    distributions = {name: _distribution([_plain(one.values[name]) for one, _ in measured]) for name in names}
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(direction="minimize" if mode == "min" else "maximize")
    for one, value in measured:
        params = {name: _plain(one.values[name]) for name in names}
        study.add_trial(optuna.trial.create_trial(params=params, distributions=distributions, value=value))
    return optuna.importance.get_param_importances(study, params=list(names))


def _distribution(values: Sequence[Any]) -> BaseDistribution:
    """A distribution over the values that were drawn."""
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        low, high = min(values), max(values)
        return FloatDistribution(low, high, log=low > 0 and high / low >= LOG_FROM)
    return CategoricalDistribution(sorted(set(values), key=str))


def _plain(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, list | dict) else value
