"""Choose the next point of a search while TPE has too few results to learn from.

The order: the baseline, points that a user asks for, the recipe, points of earlier searches (`--warm_start`),
points spread over the space. After `n_startup_trials` trials have ended, TPE proposes all points.
"""

from collections.abc import Sequence

import optuna
from optuna.trial import TrialState

from vlmtune.search.first_points import (
    BASELINE,
    EARLIER,
    RECIPE,
    REQUESTED,
    SPREAD,
    TPE,
    FirstPoints,
    recipe_outside_space,
    recipe_parameters,
    usual_rate,
)
from vlmtune.search.isolated_trial import ORIGIN
from vlmtune.search.requests import UserRequests
from vlmtune.search.space import Space
from vlmtune.search.warm_start import EarlierTrials


class PointQueue:
    """Enqueues the next point in an Optuna study, or leaves the choice to the study's sampler.

    Args:
        seed: seed of the points spread over the space.
        width: the hidden size of the model; None if it is not known.
        earlier: trials of earlier searches.
        n_startup_trials: number of trials that must have ended before TPE proposes any.
        requests: values that a user asks for on the live page; None if there is no such page.

    Attributes:
        recipe_outside_space: the recipe's option values where the space does not contain them. That trial
            runs beside the study, which cannot hold its values.
    """

    def __init__(
        self,
        space: Space,
        *,
        seed: int,
        width: int | None,
        earlier: EarlierTrials,
        n_startup_trials: int,
        requests: UserRequests | None,
    ) -> None:
        self.space, self.earlier, self.requests = space, earlier, requests
        self.n_startup_trials = n_startup_trials
        self.recipe_outside_space = recipe_outside_space(space)
        self._recipe_parameters = recipe_parameters(space)
        usual = None if width is None else usual_rate(width)
        self._spread_points = FirstPoints(space.distributions, usual, seed)

    def enqueue_next(self, study: optuna.Study, origins: Sequence[str], *, with_earlier_results: bool) -> str:
        """Enqueue the next trial's values in the study; returns where they come from.

        Nothing is enqueued for the baseline, which OptunaSearch has enqueued, for TPE, and for a recipe that
        is outside the space.

        Args:
            origins: where the values of the search's trials so far come from, in the order of proposal.
            with_earlier_results: whether the results of earlier searches are added to the study, after the
                baseline. False with several objectives, because an earlier result is the value of one metric.
        """
        if not origins:
            return BASELINE
        # After the baseline, because `Space` takes Optuna's trial 0 for the baseline.
        if len(origins) == 1 and with_earlier_results:
            self.add_earlier_results(study)
        if self.requests is not None and (requested := self.requests.take()) is not None:
            study.enqueue_trial(requested)
            return REQUESTED
        if RECIPE not in origins and self.recipe_outside_space is not None:
            return RECIPE
        if RECIPE not in origins and self._recipe_parameters is not None:
            study.enqueue_trial(self._recipe_parameters)
            return RECIPE
        if (tried := origins.count(EARLIER)) < len(self.earlier.points):
            study.enqueue_trial(self.earlier.points[tried])
            return EARLIER
        ended = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
        if len(ended) >= self.n_startup_trials:
            return TPE
        study.enqueue_trial(self._spread_points[origins.count(SPREAD)])
        return SPREAD

    def add_earlier_results(self, study: optuna.Study) -> None:
        """Add the trials of earlier searches that measured the same to the study, as complete trials."""
        scratch = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
        scratch.ask()  # its trial 0 would be the baseline
        for parameters, value in self.earlier.results:
            scratch.enqueue_trial(parameters, user_attrs={ORIGIN: EARLIER})
            trial = scratch.ask()
            self.space(trial)
            study.add_trial(scratch.tell(trial, value))
