"""Optuna as Ray Tune's search algorithm, told correctly how stopped and failed trials ended."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import optuna
from optuna.trial import TrialState
from ray.tune.search.optuna import OptunaSearch

from vlmtune.compat.ray_tune import completed_trials, optuna_study, optuna_trial
from vlmtune.packed.messages import FAILURE, VALUES
from vlmtune.search.first_points import RECIPE, STARTUP_TRIALS
from vlmtune.search.isolated_trial import ORIGIN
from vlmtune.search.point_queue import PointQueue
from vlmtune.search.requests import UserRequests
from vlmtune.search.saved_trials import End, SavedTrial
from vlmtune.search.space import Space
from vlmtune.search.study_file import StudyFile
from vlmtune.search.warm_start import EarlierTrials
from vlmtune.training.best_evaluation import ran_to_its_end
from vlmtune.training.meter import EVALUATION_NUMBER

CONSTRAINT = "infeasible"  # name of Optuna's constraint: above 0 for a trial that does not fit in memory


def make_tpe(seed: int, n_startup_trials: int = STARTUP_TRIALS) -> optuna.samplers.BaseSampler:
    """TPE that draws all searched values together and takes running trials into account.

    Of 16 combinations of TPESampler's arguments this one does best, with one trial at a time or with 16
    (docs/LOG.md, 2026-11-25).
    """
    return optuna.samplers.TPESampler(
        seed=seed, multivariate=True, constant_liar=True, n_startup_trials=n_startup_trials
    )


class TrialSearcher(OptunaSearch):
    """OptunaSearch with vlmtune's own first points (`PointQueue`), told correctly how each trial ended.

    - A stopped trial is PRUNED with the values that it reported. OptunaSearch would call it COMPLETE with its
      last early value, which biases TPE.
    - A diverged trial is PRUNED too: Optuna takes no NaN, and TPE does not learn from a trial with the state
      FAIL, so it would propose such values again.
    - A trial that does not fit in memory is PRUNED with a constraint, for the same reason.

    With `more_metrics` the study has several objectives. Optuna then takes no intermediate values, so a
    stopped trial is PRUNED without any, and ranks behind all complete trials.

    Attributes:
        origins: where each trial's values come from (see `first_points`), by trial id, in the order in which
            they were proposed.
    """

    def __init__(
        self,
        space: Space,
        *,
        metric: str,
        mode: str,
        seed: int,
        more_metrics: Mapping[str, str] | None = None,
        width: int | None = None,
        earlier: EarlierTrials | None = None,
        n_startup_trials: int = STARTUP_TRIALS,
        study_file: StudyFile | None = None,
        requests: UserRequests | None = None,
    ) -> None:
        """Make the searcher of a new search.

        Args:
            more_metrics: the mode of each further objective, by name.
            width: the hidden size of the model; None if it is not known.
            earlier: trials of earlier searches.
            n_startup_trials: number of trials that must be COMPLETE or PRUNED before TPE proposes any.
            study_file: where the study is written after each trial.
            requests: values that a person asks for. They are tried before all others but the baseline.
        """
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.objectives = {metric: mode, **(more_metrics or {})}
        several = len(self.objectives) > 1
        super().__init__(
            space,
            metric=list(self.objectives) if several else metric,
            mode=list(self.objectives.values()) if several else mode,
            sampler=make_tpe(seed, n_startup_trials),
            points_to_evaluate=[space.baseline_parameters()],
        )
        self.origins: dict[str, str] = {}
        self.seed, self.n_startup_trials = seed, n_startup_trials
        # (trial id, number of the evaluation) of each report that Optuna has received.
        self._reported: set[tuple[str, int]] = set()
        self._study_file = study_file
        self._points = PointQueue(
            space,
            seed=seed,
            width=width,
            earlier=earlier or EarlierTrials(),
            n_startup_trials=n_startup_trials,
            requests=requests,
        )

    def suggest(self, trial_id: str) -> dict[str, Any]:
        """The values of a trial under the key VALUES, and their origin under the key ORIGIN."""
        if trial_id not in self.origins:
            self.origins[trial_id] = self._points.enqueue_next(
                optuna_study(self),
                list(self.origins.values()),
                with_earlier_results=len(self.objectives) == 1,
            )
        origin = self.origins[trial_id]
        if self._is_recipe_outside_space(trial_id):
            return {VALUES: self._points.recipe_outside_space, ORIGIN: origin}
        values = super().suggest(trial_id)
        optuna_trial(self, trial_id).set_user_attr(ORIGIN, origin)
        return {VALUES: values, ORIGIN: origin}

    def propose(self, number: int, trial_id: str) -> tuple[dict[str, Any], dict[str, Any], str]:
        """The values of a new trial: by flag name, as Optuna stores them, and their origin.

        They follow from the seed, the number and the history alone, so a resumed search proposes what an
        undisturbed one would.
        """
        seed = int(np.random.SeedSequence([self.seed, number]).generate_state(1)[0])
        optuna_study(self).sampler = make_tpe(seed, self.n_startup_trials)
        config = self.suggest(trial_id)
        outside = self._is_recipe_outside_space(trial_id)
        parameters = {} if outside else dict(optuna_trial(self, trial_id).params)
        return config[VALUES], parameters, config[ORIGIN]

    def replay(self, trials: Sequence[SavedTrial]) -> None:
        """Tell Optuna of the trials of an interrupted search, in the order in which it learnt of them."""
        study = optuna_study(self)
        study.sampler = optuna.samplers.RandomSampler(seed=0)  # never asked: all values are known
        for trial in trials:
            if len(self.origins) == 1 and len(self.objectives) == 1:  # as `PointQueue.enqueue_next` does
                self._points.add_earlier_results(study)
            self.origins[trial.trial_id] = trial.origin
            if self._is_recipe_outside_space(trial.trial_id):
                continue
            if trial.number > 0:  # the baseline is `points_to_evaluate`, which OptunaSearch has enqueued
                study.enqueue_trial(trial.parameters or {})
            self.suggest(trial.trial_id)
            # Tune gives the last report of an ended trial to `on_trial_complete`, which `_tell` stands for.
            reports = trial.reports if trial.end is None else trial.reports[:-1]
            for report in reports:
                self.on_trial_result(trial.trial_id, report)
            if trial.end is not None:
                error = trial.end in (End.ERROR, End.LOST)
                self._tell(trial.trial_id, trial.last_report or None, error)

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        if self._is_recipe_outside_space(trial_id) or trial_id in completed_trials(self):
            return
        if result.get("infeasible") or len(self.objectives) > 1:
            return
        key = trial_id, result[EVALUATION_NUMBER]
        if key not in self._reported:  # a resumed trial repeats evaluations that had no checkpoint yet
            self._reported.add(key)
            optuna_trial(self, trial_id).report(result[self.metric], result[EVALUATION_NUMBER])

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        if self._is_recipe_outside_space(trial_id):
            return
        self._tell(trial_id, result, error)
        if self._study_file is not None:
            self._study_file.write(optuna_study(self))

    def _is_recipe_outside_space(self, trial_id: str) -> bool:
        """Whether a trial is the recipe and the space does not contain it: Optuna does not know the trial."""
        return self._points.recipe_outside_space is not None and self.origins.get(trial_id) == RECIPE

    def _tell(self, trial_id: str, result: dict[str, Any] | None, error: bool) -> None:
        """Tell Optuna how a trial ended."""
        if trial_id in completed_trials(self):
            # The trial failed before, and ran again in the resumed search. Optuna keeps its first state.
            return
        if error or not result or EVALUATION_NUMBER not in result:
            super().on_trial_complete(trial_id, result=None, error=error or FAILURE in (result or {}))
            return
        trial = optuna_trial(self, trial_id)
        infeasible = bool(result.get("infeasible"))
        trial.set_constraint(CONSTRAINT, float(infeasible))
        finite = all(math.isfinite(result[name]) for name in self.objectives)
        if infeasible or not ran_to_its_end(result) or not finite:
            # Ray Tune does not call on_trial_result with the result at which it stops a trial.
            self.on_trial_result(trial_id, result)
            trial.study.tell(trial, state=TrialState.PRUNED)
            completed_trials(self).add(trial_id)
        else:
            super().on_trial_complete(trial_id, result=result)
