"""Optuna as Tune's searcher, told the truth about trials that did not run to their end."""

from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState
from ray.tune.search.optuna import OptunaSearch

from vlmtune.search.space import Space

CONSTRAINT = "vlmtune:infeasible"  # user attribute of an Optuna trial: above 0 where it could not run at all


def make_sampler(seed: int) -> optuna.samplers.BaseSampler:
    """TPE that knows which trials did not fit, and which run at the moment."""
    return optuna.samplers.TPESampler(seed=seed, multivariate=True, constant_liar=True, constraints_func=constraints)


def constraints(trial: FrozenTrial) -> tuple[float]:
    """Above 0 for a trial that could not run, as TPE's constrained form wants it."""
    return (trial.user_attrs.get(CONSTRAINT, 0.0),)


class TrialSearch(OptunaSearch):
    """OptunaSearch, except for how trials end.

    OptunaSearch tells a stopped trial as COMPLETE with its early value, which biases TPE; here it is PRUNED, with the values that it
    reported on the way. One that did not fit in memory is PRUNED as well, with a constraint: told FAIL, TPE keeps proposing its region.
    """

    def __init__(self, space: Space, *, metric: str, mode: str, seed: int) -> None:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        super().__init__(space, metric=metric, mode=mode, sampler=make_sampler(seed), points_to_evaluate=[space.enqueued()])

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        stopped = result is not None and not error and result.get("step", 0) < result.get("max_steps", 0)
        infeasible = result is not None and bool(result.get("infeasible"))
        if not (stopped or infeasible) or trial_id in self._completed_trials:
            super().on_trial_complete(trial_id, result=result, error=error)
            return
        trial = self._ot_trials[trial_id]
        trial.set_user_attr(CONSTRAINT, float(infeasible))
        trial.study.tell(trial, state=TrialState.PRUNED)
        self._completed_trials.add(trial_id)
