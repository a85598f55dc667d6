"""Build and run the search: Ray Tune drives, Optuna proposes, ASHA stops early, Ray Train trains each
trial."""

import math
from functools import partial
from typing import Any

from ray import tune
from ray.exceptions import RayActorError
from ray.tune.experiment import Trial
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler

from vlmtune.config.settings import Settings
from vlmtune.search.results import mode_of
from vlmtune.search.runner import Runner
from vlmtune.search.sampler import TrialSearch
from vlmtune.search.space import Space
from vlmtune.search.trial import POINT, point

TRIAL_CPUS = 0.01  # a trial's driver only waits for its workers; a whole CPU each would leave none for them
PROGRESS = "progress"  # how much of its run a trial has done, up to 1: what ASHA calls time
NEVER = 2.0  # of a run: what ASHA calls max_t, at which it would stop a trial


def run_search(
    settings: Settings,
    space: Space,
    output_dir: str,
    callback: tune.Callback,
    runner: Runner,
    *,
    resume: bool,
) -> tune.ResultGrid:
    """Run the search of `settings` into `output_dir`/tune, or go on with the one that is there, if it had
    begun."""
    trial = tune.with_resources(runner.trainable, {"cpu": TRIAL_CPUS})
    folder = f"{output_dir}/tune"
    begun = resume and tune.Tuner.can_restore(folder)
    grid = (
        restored_tuner(folder, trial)
        if begun
        else make_tuner(settings, space, output_dir, callback, runner, trial)
    ).fit()
    if runner.reuse_processes and any(isinstance(error, RayActorError) for error in grid.errors):
        # Tune begins a trial again whose process ends, except where that process was just taking it on after
        # another one.
        grid = restored_tuner(folder, trial).fit()
    return grid


def restored_tuner(folder: str, trial: Any) -> tune.Tuner:
    """The search in `folder`, to go on with: trials that failed begin anew, those that were under way at
    their last checkpoint."""
    return tune.Tuner.restore(folder, trial, resume_unfinished=True, restart_errored=True)


def make_tuner(
    settings: Settings, space: Space, output_dir: str, callback: tune.Callback, runner: Runner, trial: Any
) -> tune.Tuner:
    """A search that has not begun."""
    search = settings.search
    config = tune.TuneConfig(
        metric=search.metric,
        mode=search.mode,
        search_alg=None if space.is_grid else make_searcher(settings, space),
        scheduler=make_scheduler(settings, space),
        num_samples=1 if space.is_grid else search.num_samples,
        max_concurrent_trials=runner.at_once,
        reuse_actors=runner.reuse_processes,
        time_budget_s=search.time_budget_s,
        trial_dirname_creator=lambda trial: trial.trial_id,
    )
    return tune.Tuner(
        trial,
        param_space={POINT: tune.grid_search(space.grid())} if space.is_grid else None,
        tune_config=config,
        run_config=tune.RunConfig(
            name="tune",
            storage_path=output_dir,
            verbose=0,
            callbacks=[callback],
            stop=partial(diverged, metric=search.metric),
            failure_config=tune.FailureConfig(max_failures=runner.max_failures),
        ),
    )


def make_searcher(settings: Settings, space: Space) -> TrialSearch:
    """Optuna over the space, for one objective or several."""
    search = settings.search
    more = {name: mode_of(name) for name in search.more_metrics or ()}
    return TrialSearch(space, metric=search.metric, mode=search.mode, seed=settings.training.seed, more=more)


def diverged(trial_id: str, result: dict[str, Any], *, metric: str) -> bool:
    """Whether a trial need not go on: its metric is no number any more. ASHA lets such a trial run to its
    end."""
    return not math.isfinite(result[metric])


def make_scheduler(settings: Settings, space: Space) -> TrialScheduler:
    """ASHA over the share of its run that a trial has done, which is the same at every trial's evaluations;
    or none."""
    if settings.search.early_stopping == "none":
        return FIFOScheduler()
    return Asha(space, settings.search.grace_period, settings.search.reduction_factor)


class Asha(ASHAScheduler):
    """ASHA that lets the config's own values run to their end: what searching was worth is told against
    them."""

    def __init__(self, space: Space, grace_period: float, reduction_factor: int) -> None:
        options: Any = {
            "time_attr": PROGRESS,
            "grace_period": grace_period,
            "max_t": NEVER,
        }  # Ray's types say whole numbers
        super().__init__(reduction_factor=reduction_factor, **options)
        self.own = {**space.own, **space.constants}

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        decision: str = super().on_trial_result(tune_controller, trial, _timed(result))
        return TrialScheduler.CONTINUE if point(trial.config) == self.own else decision

    def on_trial_complete(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> None:
        if math.isfinite(result.get(self.metric or "", math.nan)):  # NaN is nothing to compare others with
            super().on_trial_complete(tune_controller, trial, _timed(result))


def _timed(result: dict[str, Any]) -> dict[str, Any]:
    """A result with its progress, if it is of a trial that trained."""
    return {**result, PROGRESS: result["step"] / result["max_steps"]} if "step" in result else result
