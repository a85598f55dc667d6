"""Optuna as Ray Tune's search algorithm, with the true state of trials that did not run to their end."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import optuna
from optuna.trial import TrialState
from ray.tune.search.optuna import OptunaSearch

from vlmtune.compat.ray_tune import completed_trials, optuna_study, optuna_trial
from vlmtune.packed.messages import FAILURE
from vlmtune.search.first_points import (
    BASELINE,
    EARLIER,
    MODEL,
    RECIPE,
    SPREAD,
    STARTUP,
    FirstPoints,
    recipe_parameters,
    separate_recipe,
    usual_rate,
)
from vlmtune.search.isolated_trial import GRID_POINT, PROPOSAL
from vlmtune.search.requests import Requests
from vlmtune.search.saved_trials import End, SavedTrial
from vlmtune.search.space import Space
from vlmtune.search.study_file import StudyFile
from vlmtune.search.warm_start import EarlierTrials
from vlmtune.training.best_evaluation import has_ended
from vlmtune.training.meter import EVALUATION_NUMBER

PROPOSED = "proposed"  # the origin of values that a person asked for
CONSTRAINT = "infeasible"  # name of Optuna's constraint: above 0 for a trial that does not fit in memory


def make_tpe(seed: int, startup: int = STARTUP) -> optuna.samplers.BaseSampler:
    """TPE that draws all options together and takes running trials into account.

    Of 16 combinations of its options this one does best, with one trial at a time or with 16 (docs/LOG.md,
    2026-11-25).
    """
    return optuna.samplers.TPESampler(
        seed=seed, multivariate=True, constant_liar=True, n_startup_trials=startup
    )


class TrialSearcher(OptunaSearch):
    """OptunaSearch with first proposals of its own, and with the true state of trials that did not end.

    The first proposals are the baseline, the recipe, points of earlier searches, and `FirstPoints` until
    `startup` trials have ended. All later ones are the model's.

    - A stopped trial is PRUNED with the values that it reported. OptunaSearch tells COMPLETE with its early
      value, which biases TPE.
    - A diverged trial is PRUNED too: Optuna takes no NaN, and after FAIL, TPE keeps proposing its region.
    - A trial that does not fit in memory is PRUNED with a constraint, for the same reason.

    With `more` metrics the study has several objectives. Optuna then takes no intermediate values, so that a
    stopped trial is PRUNED without any, and ranks behind all complete trials.

    Attributes:
        origins: where each trial's values come from, by trial id in the order of proposal.
    """

    def __init__(
        self,
        space: Space,
        *,
        metric: str,
        mode: str,
        seed: int,
        more: Mapping[str, str] | None = None,
        width: int | None = None,
        earlier: EarlierTrials | None = None,
        startup: int = STARTUP,
        study_file: StudyFile | None = None,
        requests: Requests | None = None,
    ) -> None:
        """Make the searcher of a new search.

        Args:
            more: the mode of each further metric, by name.
            width: the hidden size of the model.
            earlier: trials of earlier searches.
            startup: the number of trials that end before the model proposes any.
            study_file: where the study is written after each trial.
            requests: values that a person asks for, which are tried before all others but the baseline.
        """
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.objectives = {metric: mode, **(more or {})}
        names, modes = (list(self.objectives), list(self.objectives.values())) if more else (metric, mode)
        super().__init__(
            space,
            metric=names,
            mode=modes,
            sampler=make_tpe(seed, startup),
            points_to_evaluate=[space.baseline_parameters()],
        )
        self.origins: dict[str, str] = {}
        self.seed = seed
        self._told: set[tuple[str, int]] = set()  # reports: trial id and number of the evaluation
        self.startup, self._study_file, self._requests = startup, study_file, requests
        self._values_of = space  # as OptunaSearch has it, but with its type
        self._recipe, self._separate = recipe_parameters(space), separate_recipe(space)
        self._earlier = earlier or EarlierTrials()
        usual = None if width is None else usual_rate(width)
        self._first_points = FirstPoints(space.distributions, usual, seed)

    def suggest(self, trial_id: str) -> dict[str, Any]:
        """The values of a trial under GRID_POINT, and where they come from under PROPOSAL."""
        if trial_id not in self.origins:
            self.origins[trial_id] = self._next_origin()
        origin = self.origins[trial_id]
        if self._is_separate(trial_id):
            return {GRID_POINT: self._separate, PROPOSAL: origin}
        values = super().suggest(trial_id)
        optuna_trial(self, trial_id).set_user_attr(PROPOSAL, origin)
        return {GRID_POINT: values, PROPOSAL: origin}

    def propose(self, number: int, trial_id: str) -> tuple[dict[str, Any], dict[str, Any], str]:
        """The values of a new trial by flag name, as Optuna stores them, and where they come from.

        They follow from the seed, the number and the history alone, so a resumed search proposes what an
        undisturbed one would.
        """
        seed = int(np.random.SeedSequence([self.seed, number]).generate_state(1)[0])
        optuna_study(self).sampler = make_tpe(seed, self.startup)
        config = self.suggest(trial_id)
        separate = self._is_separate(trial_id)
        parameters = {} if separate else dict(optuna_trial(self, trial_id).params)
        return config[GRID_POINT], parameters, config[PROPOSAL]

    def replay(self, trials: Sequence[SavedTrial]) -> None:
        """Tell Optuna of the trials of an interrupted search, as it was told of them then."""
        study = optuna_study(self)
        study.sampler = optuna.samplers.RandomSampler(seed=0)  # is not used, and costs no time
        for trial in trials:
            if len(self.origins) == 1:  # as `_next_origin` does after the baseline
                self._add_observations()
            self.origins[trial.trial_id] = trial.proposal
            if self._is_separate(trial.trial_id):
                continue
            if trial.number > 0:
                study.enqueue_trial(trial.parameters or {})
            self.suggest(trial.trial_id)
            reports = trial.reports if trial.end is None else trial.reports[:-1]
            for report in reports:
                self.on_trial_result(trial.trial_id, report)
            if trial.end is not None:
                error = trial.end in (End.ERROR, End.LOST)
                self._tell(trial.trial_id, trial.last_report or None, error)

    def _next_origin(self) -> str:
        """Where the next trial's values come from; enqueues them, unless they are the model's."""
        known = list(self.origins.values())
        if not known:
            return BASELINE
        if len(known) == 1:  # `Space` takes Optuna's trial 0 for the baseline
            self._add_observations()
        if self._requests is not None and (proposal := self._requests.take()) is not None:
            optuna_study(self).enqueue_trial(proposal)
            return PROPOSED
        if RECIPE not in known and self._separate is not None:
            return RECIPE
        study = optuna_study(self)
        if RECIPE not in known and self._recipe is not None:
            study.enqueue_trial(self._recipe)
            return RECIPE
        if (tried := known.count(EARLIER)) < len(self._earlier.points):
            study.enqueue_trial(self._earlier.points[tried])
            return EARLIER
        ended = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
        if len(ended) >= self.startup:
            return MODEL
        study.enqueue_trial(self._first_points[known.count(SPREAD)])
        return SPREAD

    def _add_observations(self) -> None:
        """Add the trials of earlier searches of the same problem to the study."""
        study = optuna_study(self)
        scratch = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
        scratch.ask()  # its trial 0 would be the baseline
        for parameters, value in self._earlier.observations if len(self.objectives) == 1 else ():
            scratch.enqueue_trial(parameters, user_attrs={PROPOSAL: EARLIER})
            trial = scratch.ask()
            self._values_of(trial)
            study.add_trial(scratch.tell(trial, value))

    def _is_separate(self, trial_id: str) -> bool:
        """Whether a trial is the recipe, run beside the search because the space does not have it."""
        return self._separate is not None and self.origins.get(trial_id) == RECIPE

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        if self._is_separate(trial_id) or trial_id in completed_trials(self):
            return
        if result.get("infeasible") or len(self.objectives) > 1:
            return
        key = trial_id, result[EVALUATION_NUMBER]
        if key not in self._told:  # a resumed trial repeats what had no checkpoint yet
            self._told.add(key)
            optuna_trial(self, trial_id).report(result[self.metric], result[EVALUATION_NUMBER])

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        if self._is_separate(trial_id):
            return
        self._tell(trial_id, result, error)
        if self._study_file is not None:
            self._study_file.write(optuna_study(self))

    def _tell(self, trial_id: str, result: dict[str, Any] | None, error: bool) -> None:
        """Tell Optuna how a trial ended."""
        if trial_id in completed_trials(self):
            # It failed, and ran again in the resumed search. Optuna keeps the first state.
            return
        if error or not result or EVALUATION_NUMBER not in result:
            super().on_trial_complete(trial_id, result=None, error=error or FAILURE in (result or {}))
            return
        trial = optuna_trial(self, trial_id)
        infeasible = bool(result.get("infeasible"))
        trial.set_constraint(CONSTRAINT, float(infeasible))
        finite = all(math.isfinite(result[name]) for name in self.objectives)
        if infeasible or not has_ended(result) or not finite:
            self.on_trial_result(
                trial_id, result
            )  # Tune does not pass on the result at which it stops a trial
            trial.study.tell(trial, state=TrialState.PRUNED)
            completed_trials(self).add(trial_id)
        else:
            super().on_trial_complete(trial_id, result=result)
