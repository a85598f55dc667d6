"""Run the trials: Ray Tune drives them, Optuna proposes them, ASHA stops them early."""

import math
from functools import partial
from typing import Any

from ray import tune
from ray.exceptions import RayActorError
from ray.tune.experiment import Trial
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler

from vlmtune.config.settings import Settings
from vlmtune.search.first_points import recipe_values, separate_recipe, trial_count
from vlmtune.search.isolated_trial import GRID_POINT, trial_values
from vlmtune.search.objectives import mode_of
from vlmtune.search.sampler import TrialSearcher
from vlmtune.search.space import Space
from vlmtune.search.study_file import STUDY_FILE, StudyFile
from vlmtune.search.trial_runners import TrialRunner
from vlmtune.search.warm_start import EarlierTrials

# CPUs of a trial's driver, which only waits for its workers. With a whole CPU for each driver, none would be
# left for the workers.
TRIAL_CPUS = 0.01
PROGRESS = "progress"  # in a result: the share of its run that a trial has done; ASHA's time attribute
NEVER = 2.0  # ASHA's max_t, at which it stops a trial; PROGRESS never exceeds 1


def run_trials(
    settings: Settings,
    space: Space,
    output_dir: str,
    callback: tune.Callback,
    runner: TrialRunner,
    *,
    resume: bool,
    earlier: EarlierTrials | None = None,
) -> tune.ResultGrid:
    """Run all trials of a search; Tune's state goes to `output_dir`/tune.

    With `resume`, the search that has begun there is resumed, if it has.
    """
    trainable = tune.with_resources(runner.trainable, {"cpu": TRIAL_CPUS})
    folder = f"{output_dir}/tune"
    if resume and tune.Tuner.can_restore(folder):
        tuner = restore_tuner(folder, trainable)
    else:
        tuner = make_tuner(settings, space, output_dir, callback, runner, trainable, earlier)
    grid = tuner.fit()
    if runner.reuse_actors and any(isinstance(error, RayActorError) for error in grid.errors):
        # Tune restarts a trial whose process died, unless the process died while it was given that trial.
        grid = restore_tuner(folder, trainable).fit()
    return grid


def restore_tuner(folder: str, trainable: Any) -> tune.Tuner:
    """The tuner of an interrupted search. Failed trials restart, unfinished ones resume from a checkpoint."""
    return tune.Tuner.restore(folder, trainable, resume_unfinished=True, restart_errored=True)


def make_tuner(
    settings: Settings,
    space: Space,
    output_dir: str,
    callback: tune.Callback,
    runner: TrialRunner,
    trainable: Any,
    earlier: EarlierTrials | None = None,
) -> tune.Tuner:
    """The tuner of a new search."""
    search = settings.search
    config = tune.TuneConfig(
        metric=search.metric,
        mode=search.mode,
        search_alg=None if space.is_grid else make_searcher(settings, space, output_dir, earlier),
        scheduler=make_scheduler(settings, space),
        num_samples=1 if space.is_grid else trial_count(space),
        max_concurrent_trials=runner.max_concurrent_trials,
        reuse_actors=runner.reuse_actors,
        time_budget_s=search.time_budget_s,
        trial_dirname_creator=lambda trial: trial.trial_id,
    )
    return tune.Tuner(
        trainable,
        param_space={GRID_POINT: tune.grid_search(grid_points(space))} if space.is_grid else None,
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


def grid_points(space: Space) -> list[dict[str, Any]]:
    """The points of a grid, and the recipe where it is run beside them."""
    recipe = separate_recipe(space)
    return [*space.grid(), *([recipe] if recipe is not None else [])]


def make_searcher(
    settings: Settings, space: Space, output_dir: str, earlier: EarlierTrials | None = None
) -> TrialSearcher:
    """Optuna over the space, for one objective or several."""
    search = settings.search
    more = {name: mode_of(name) for name in search.more_metrics or ()}
    named = settings.model.model_name_or_path is not None
    width = settings.model.ref.config().get_text_config().hidden_size if named else None
    return TrialSearcher(
        space,
        metric=search.metric,
        mode=search.mode,
        seed=settings.training.seed,
        more=more,
        width=width,
        earlier=earlier,
        study_file=StudyFile(f"{output_dir}/{STUDY_FILE}", [search.metric, *more]),
    )


def diverged(trial_id: str, result: dict[str, Any], *, metric: str) -> bool:
    """Whether to stop a trial because its metric is NaN or infinite. ASHA would let it run to its end."""
    return not math.isfinite(result[metric])


def make_scheduler(settings: Settings, space: Space) -> TrialScheduler:
    """ASHA over the share of its run that a trial has done, or a scheduler that stops nothing.

    The share is the same at the same evaluation of every trial.
    """
    if settings.search.early_stopping == "none":
        return FIFOScheduler()
    return BaselineAwareAsha(space, settings.search.grace_period, settings.search.reduction_factor)


class BaselineAwareAsha(ASHAScheduler):
    """ASHA that never stops baseline and recipe, because the result of the search is compared with them."""

    def __init__(self, space: Space, grace_period: float, reduction_factor: int) -> None:
        # Fractions are fine; Ray's types ask for whole numbers.
        options: Any = {"time_attr": PROGRESS, "grace_period": grace_period, "max_t": NEVER}
        super().__init__(reduction_factor=reduction_factor, **options)
        self.baseline = {**space.baseline, **space.constants}
        self.compared = [self.baseline, recipe_values(space)]

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        decision: str = super().on_trial_result(tune_controller, trial, _with_progress(result))
        is_compared = trial_values(trial.config) in self.compared
        return TrialScheduler.CONTINUE if is_compared else decision

    def on_trial_complete(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> None:
        # NaN would spoil the quantiles that other trials are compared with.
        if math.isfinite(result.get(self.metric or "", math.nan)):
            super().on_trial_complete(tune_controller, trial, _with_progress(result))


def _with_progress(result: dict[str, Any]) -> dict[str, Any]:
    """A result with PROGRESS added, if it is a report of training."""
    return {**result, PROGRESS: result["step"] / result["max_steps"]} if "step" in result else result
