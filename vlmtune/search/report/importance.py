"""How much each searched option mattered, by Optuna's own evaluator."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

from vlmtune.search.report.charts import LOG_FROM
from vlmtune.search.results import COMPLETE, TrialRow

ENOUGH = 8  # trials: with fewer, a share is chance


def importances(
    rows: Sequence[TrialRow],
    curves: Mapping[str, Sequence[tuple[float, float]]],
    names: Sequence[str],
    metric: str,
    mode: str,
) -> tuple[dict[str, float], str] | None:
    """(share of each option, largest first; of what) or None where too few trials can tell.

    Of the final value where enough trials ran to their end; else of the first evaluation, which early
    stopping lets every trial reach.

    Args:
        names: the options that vary by themselves; those that follow from others share their importance.
    """
    ended = [(row, row.metrics.get(metric, math.nan)) for row in rows if row.state == COMPLETE]
    first = [(row, curves[row.trial_id][0][1]) for row in rows if curves.get(row.trial_id)]
    for measured, of in ((ended, f"{metric} at the end"), (first, f"{metric} at a trial's first evaluation")):
        kept = [
            (row, value)
            for row, value in measured
            if math.isfinite(value) and all(name in row.values for name in names)
        ]
        varying = [name for name in names if len({_plain(row.values[name]) for row, _ in kept}) > 1]
        if len(kept) >= ENOUGH and varying:
            return _evaluated(kept, varying, mode), f"{of}, {len(kept)} trials"
    return None


def _evaluated(
    measured: Sequence[tuple[TrialRow, float]], names: Sequence[str], mode: str
) -> dict[str, float]:
    distributions = {name: _distribution([_plain(row.values[name]) for row, _ in measured]) for name in names}
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(direction="minimize" if mode == "min" else "maximize")
    for row, value in measured:
        params = {name: _plain(row.values[name]) for name in names}
        study.add_trial(optuna.trial.create_trial(params=params, distributions=distributions, value=value))
    return optuna.importance.get_param_importances(study, params=list(names))


def _distribution(values: Sequence[Any]) -> BaseDistribution:
    """What holds these values: as much of the searched range as was drawn."""
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        low, high = min(values), max(values)
        return FloatDistribution(low, high, log=low > 0 and high / low >= LOG_FROM)
    return CategoricalDistribution(sorted(set(values), key=str))


def _plain(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, list | dict) else value
