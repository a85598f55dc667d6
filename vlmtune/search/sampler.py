"""Optuna as Ray Tune's search algorithm, with the true state of trials that did not run to their end."""

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

CONSTRAINT = "infeasible"  # name of Optuna's constraint: above 0 for a trial that does not fit in memory


def make_tpe(seed: int) -> optuna.samplers.BaseSampler:
    """TPE that draws all options together and takes running trials into account.

    Of 16 combinations of its options this one does best, with one trial at a time or with 16 (docs/LOG.md,
    2026-11-25).
    """
    return optuna.samplers.TPESampler(seed=seed, multivariate=True, constant_liar=True)


class TrialSampler(OptunaSearch):
    """OptunaSearch that differs in the state that Optuna is told when a trial ends.

    - A stopped trial is PRUNED with the values that it reported. OptunaSearch tells COMPLETE with its early
      value, which biases TPE.
    - A diverged trial is PRUNED too: Optuna takes no NaN, and after FAIL, TPE keeps proposing its region.
    - A trial that does not fit in memory is PRUNED with a constraint, for the same reason.

    With `more` metrics the study has several objectives. Optuna then takes no intermediate values, so that a
    stopped trial is PRUNED without any, and ranks behind all complete trials.
    """

    def __init__(
        self, space: Space, *, metric: str, mode: str, seed: int, more: Mapping[str, str] | None = None
    ) -> None:
        """`more`: the mode of each further metric, by name."""
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.objectives = {metric: mode, **(more or {})}
        names, modes = (list(self.objectives), list(self.objectives.values())) if more else (metric, mode)
        super().__init__(
            space,
            metric=names,
            mode=modes,
            sampler=make_tpe(seed),
            points_to_evaluate=[space.baseline_parameters()],
        )

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        if trial_id in completed_trials(self) or result.get("infeasible") or len(self.objectives) > 1:
            return
        optuna_trial(self, trial_id).report(result[self.metric], result[EVALUATION])

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        if trial_id in completed_trials(self):
            # It failed, and ran again in the resumed search. Optuna keeps the first state.
            return
        if error or not result or EVALUATION not in result:
            super().on_trial_complete(trial_id, result=None, error=error or FAILURE in (result or {}))
            return
        trial = optuna_trial(self, trial_id)
        infeasible = bool(result.get("infeasible"))
        trial.set_constraint(CONSTRAINT, float(infeasible))
        finite = all(math.isfinite(result[name]) for name in self.objectives)
        if infeasible or result["step"] < result["max_steps"] or not finite:
            self.on_trial_result(
                trial_id, result
            )  # Tune does not pass on the result at which it stops a trial
            trial.study.tell(trial, state=TrialState.PRUNED)
            completed_trials(self).add(trial_id)
        else:
            super().on_trial_complete(trial_id, result=result)
