"""Optuna as Tune's searcher, told the truth about trials that did not run to their end."""

import math
from collections.abc import Mapping
from typing import Any

import optuna
from optuna.trial import TrialState
from ray.tune.search.optuna import OptunaSearch

from vlmtune.compat.ray_tune import completed_trials, optuna_trial
from vlmtune.packed.messages import FAILURE
from vlmtune.search.space import Space
from vlmtune.training.meter import EVALUATION

CONSTRAINT = "infeasible"  # the name of Optuna's constraint: above 0 for a trial that could not run at all


def make_sampler(seed: int) -> optuna.samplers.BaseSampler:
    """TPE that draws all options together and knows which trials run at the moment.

    Of 16 settings of its options these lose least, with one trial at a time or with 16 (docs/LOG.md,
    2026-11-25).
    """
    return optuna.samplers.TPESampler(seed=seed, multivariate=True, constant_liar=True)


class TrialSearch(OptunaSearch):
    """OptunaSearch, except for how trials end.

    OptunaSearch tells a stopped trial as COMPLETE with its early value, which biases TPE; here it is PRUNED,
    with the values that it
    reported on the way. One that diverged is PRUNED too: Optuna takes no NaN, and told FAIL, TPE keeps
    proposing its region. One that
    did not fit in memory is PRUNED with a constraint, for the same reason.

    With `more` metrics, by name with their modes, the study has several objectives. Optuna takes no values
    on the way then, so a stopped
    trial is PRUNED without one, and ranks behind all that ran to their end.
    """

    def __init__(
        self, space: Space, *, metric: str, mode: str, seed: int, more: Mapping[str, str] | None = None
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.objectives = {metric: mode, **(more or {})}
        names, modes = (list(self.objectives), list(self.objectives.values())) if more else (metric, mode)
        super().__init__(
            space, metric=names, mode=modes, sampler=make_sampler(seed), points_to_evaluate=[space.enqueued()]
        )

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        if (
            trial_id not in completed_trials(self)
            and not result.get("infeasible")
            and len(self.objectives) == 1
        ):
            optuna_trial(self, trial_id).report(result[self.metric], result[EVALUATION])

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        if trial_id in completed_trials(self):
            # it had failed and ran once more when the search was resumed; Optuna keeps its first answer
            return
        if error or not result or EVALUATION not in result:
            super().on_trial_complete(trial_id, result=None, error=error or FAILURE in (result or {}))
            return
        trial = optuna_trial(self, trial_id)
        infeasible = bool(result.get("infeasible"))
        trial.set_constraint(CONSTRAINT, float(infeasible))
        finite = all(math.isfinite(result[name]) for name in self.objectives)
        if infeasible or result["step"] < result["max_steps"] or not finite:
            self.on_trial_result(trial_id, result)  # Tune does not pass on the one at which it stops a trial
            trial.study.tell(trial, state=TrialState.PRUNED)
            completed_trials(self).add(trial_id)
        else:
            super().on_trial_complete(trial_id, result=result)
