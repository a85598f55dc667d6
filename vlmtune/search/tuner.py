"""Run the trials of a search: Ray Tune runs them, Optuna proposes their values, ASHA stops them early."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ray import tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler

from vlmtune.config.settings import Settings
from vlmtune.errors import RunStoppedError
from vlmtune.faults import output_fault
from vlmtune.packed.messages import TRIAL_ID
from vlmtune.search.first_points import recipe_outside_space, recipe_values, trial_count
from vlmtune.search.isolated_trial import trial_values
from vlmtune.search.live_state import LiveState
from vlmtune.search.objectives import mode_of, objectives_of
from vlmtune.search.requests import UserRequests
from vlmtune.search.saved_trials import End, SavedTrial, SavedTrials
from vlmtune.search.searcher import TrialSearcher
from vlmtune.search.space import Space
from vlmtune.search.study_file import STUDY_FILE, StudyFile
from vlmtune.search.trial_console import TrialConsole
from vlmtune.search.trial_queue import GridPoints, Proposer, TrialQueue
from vlmtune.search.trial_recorder import SearchStopper, TrialRecorder
from vlmtune.search.trial_runners import TrialRunner
from vlmtune.search.warm_start import EarlierTrials

# CPUs that Ray reserves for the process of a trial's trainable, which only waits for the trial's workers.
# With a whole CPU for each trainable, none would be left for the workers.
TRIAL_CPUS = 0.01
PROGRESS = "progress"  # key of a result: the share of its steps that a trial has trained; ASHA's time_attr
# Passes over all trials. The second one runs the trials again whose process died while Tune reset it for
# them.
MAX_PASSES = 2
UNREACHED_MAX_T = 2.0  # ASHA stops a trial at max_t, which must not happen: PROGRESS never exceeds 1


def run_trials(
    settings: Settings,
    space: Space,
    output_dir: str,
    console: TrialConsole,
    runner: TrialRunner,
    trials: Sequence[SavedTrial] = (),
    earlier: EarlierTrials | None = None,
) -> list[SavedTrial]:
    """Run the trials of a search that have not ended. Tune's own files go to `output_dir`/tune.

    Args:
        trials: the trials of the interrupted search that is resumed; unfinished ones continue from their
            checkpoints. Empty for a new search.
        earlier: trials of other, finished searches (`--warm_start`).

    Returns:
        All trials, also those of the interrupted search, in the order in which they were proposed.

    Raises:
        RunStoppedError: the disk failed, or the output folder is gone.
    """
    saved = SavedTrials(output_dir)
    console.open([trial for trial in trials if trial.end is not None])
    for number in range(MAX_PASSES):
        proposer: Proposer
        if space.is_grid:
            proposer = GridPoints(grid_points(space))
        else:
            proposer = make_searcher(settings, space, output_dir, earlier)
        # `--num_samples` trials, or all points of a grid; the queue counts those that `trials` has already.
        queue = TrialQueue(proposer, trials, trial_count(space))
        run_queue(settings, runner, queue, saved, make_scheduler(settings, space, trials), console)
        trials = sorted(queue.trials.values(), key=lambda trial: trial.number)
        lost = [trial for trial in trials if trial.end is End.LOST]
        # Tune restarts a trial whose process died, but not if the process of an ended trial died while Tune
        # reset it for this one (`reuse_actors`).
        if not lost or not runner.reuse_actors or number == MAX_PASSES - 1:
            break
        for trial in lost:
            trial.reopen()
    console.close()
    return list(trials)


def run_queue(
    settings: Settings,
    runner: TrialRunner,
    queue: TrialQueue,
    saved: SavedTrials,
    scheduler: "BaselineAwareAsha | NoEarlyStopping",
    console: TrialConsole | None,
) -> None:
    """Run the trials that are left in a queue.

    Raises:
        RunStoppedError: the disk failed, or the output folder is gone.
    """
    stopper = SearchStopper(
        settings.search.metric, settings.search.time_budget_s, saved, UserRequests(saved.folder)
    )
    ended = sum(trial.end is not None for trial in queue.trials.values())
    live = LiveState(saved.folder, objectives_of(settings), ended + queue.left)
    recorder = TrialRecorder(queue, saved, console, stopper, scheduler.stopped, live)
    if queue.left:
        make_tuner(settings, saved.folder, runner, queue, scheduler, recorder, stopper).fit()
    if stopper.budget_spent and stopper.fault is None:
        for trial in queue.trials.values():
            if trial.end is None:  # Tune reports nothing about a trial that it has not started
                trial.end = End.BUDGET
                saved.save(trial)
    saved.flush()
    # `stop_all` looks once more for a trial's file that could not be written: Tune calls it only while trials
    # run.
    if stopper.stop_all() and stopper.fault is not None:
        raise RunStoppedError(output_fault(saved.folder, stopper.fault))


def make_tuner(
    settings: Settings,
    output_dir: str,
    runner: TrialRunner,
    queue: TrialQueue,
    scheduler: TrialScheduler,
    recorder: tune.Callback,
    stopper: tune.Stopper,
) -> tune.Tuner:
    """The tuner of a new or a resumed search. What Tune saves is not read, see `SavedTrials`."""
    search = settings.search
    config = tune.TuneConfig(
        metric=search.metric,
        mode=search.mode,
        search_alg=queue,
        scheduler=scheduler,
        num_samples=queue.left,
        max_concurrent_trials=runner.max_concurrent_trials,
        reuse_actors=runner.reuse_actors,
        trial_dirname_creator=lambda trial: trial.config[TRIAL_ID],
    )
    return tune.Tuner(
        tune.with_resources(runner.trainable, {"cpu": TRIAL_CPUS}),
        tune_config=config,
        run_config=tune.RunConfig(
            name="tune",
            storage_path=output_dir,
            verbose=0,
            callbacks=[recorder],
            stop=stopper,
            failure_config=tune.FailureConfig(max_failures=runner.max_failures),
        ),
    )


def grid_points(space: Space) -> list[dict[str, Any]]:
    """The points of a grid, and the recipe if the grid does not contain it."""
    recipe = recipe_outside_space(space)
    return [*space.grid(), *([recipe] if recipe is not None else [])]


def make_searcher(
    settings: Settings, space: Space, output_dir: str, earlier: EarlierTrials | None = None
) -> TrialSearcher:
    """The searcher with which Optuna proposes points of the space, for one objective or several."""
    search = settings.search
    more_metrics = {name: mode_of(name) for name in search.more_metrics or ()}
    # Without a model (tests and benchmarks of the search), the usual learning rate of its width is not known.
    has_model = settings.model.model_name_or_path is not None
    width = settings.model.ref.config().get_text_config().hidden_size if has_model else None
    return TrialSearcher(
        space,
        metric=search.metric,
        mode=search.mode,
        seed=settings.training.seed,
        more_metrics=more_metrics,
        width=width,
        earlier=earlier,
        requests=UserRequests(output_dir),
        study_file=StudyFile(f"{output_dir}/{STUDY_FILE}", [search.metric, *more_metrics]),
    )


def make_scheduler(
    settings: Settings, space: Space, saved_trials: Sequence[SavedTrial] = ()
) -> "BaselineAwareAsha | NoEarlyStopping":
    """ASHA, or a scheduler that stops no trial.

    ASHA compares trials at the same fraction of their steps (PROGRESS), because trials may have different
    numbers of steps.

    Args:
        saved_trials: the trials of an interrupted search; their reports fill ASHA's rungs again.
    """
    search = settings.search
    if search.early_stopping == "none":
        return NoEarlyStopping()
    return BaselineAwareAsha(space, search.grace_period, search.reduction_factor, saved_trials)


class NoEarlyStopping(FIFOScheduler):
    """Tune's first-in-first-out scheduler. `stopped`, as in `BaselineAwareAsha`, is always empty."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.stopped: set[str] = set()


@dataclass(frozen=True)
class ReplayedTrial:
    """An ended trial of an interrupted search, with the one attribute of Tune's `Trial` that ASHA reads."""

    trial_id: str


class BaselineAwareAsha(ASHAScheduler):
    """ASHA that never stops the baseline and the recipe: the search's result is compared with them.

    Args:
        saved_trials: the trials of an interrupted search. Their reports fill the rungs again.

    Attributes:
        stopped: ids of the trials that it has stopped: vlmtune's own (TRIAL_ID), not those of Tune.
    """

    def __init__(
        self,
        space: Space,
        grace_period: float,
        reduction_factor: int,
        saved_trials: Sequence[SavedTrial] = (),
    ) -> None:
        # ASHA accepts fractions, although Ray annotates these arguments as int.
        options: Any = {"time_attr": PROGRESS, "grace_period": grace_period, "max_t": UNREACHED_MAX_T}
        super().__init__(reduction_factor=reduction_factor, **options)
        self.baseline = {**space.baseline, **space.constants}
        self.never_stopped = [self.baseline, recipe_values(space)]
        self.stopped: set[str] = set()
        self._saved_trials = {trial.trial_id: trial for trial in saved_trials}

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        # The ended trials are replayed here and not in `__init__`, because Tune sets the metric in between.
        for saved in [saved for saved in self._saved_trials.values() if saved.end is not None]:
            del self._saved_trials[saved.trial_id]
            self._replay(tune_controller, ReplayedTrial(saved.trial_id), saved)
        super().on_trial_add(tune_controller, trial)
        resumed = self._saved_trials.pop(trial.config.get(TRIAL_ID, ""), None)
        if resumed is not None:
            self._add_reports(tune_controller, trial, resumed)

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        decision: str = super().on_trial_result(tune_controller, trial, _with_progress(result))
        if trial_values(trial.config) in self.never_stopped:
            return TrialScheduler.CONTINUE
        if decision == TrialScheduler.STOP:
            self.stopped.add(trial.config[TRIAL_ID])
        return decision

    def on_trial_complete(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> None:
        # An infinite value would change the cutoffs that other trials are compared with. ASHA ignores NaN,
        # but numpy warns about a rung of NaN alone. `on_trial_result` gets neither, because SearchStopper
        # ends such a trial first, and Tune then calls this method instead.
        if math.isfinite(result.get(self.metric or "", math.nan)):
            super().on_trial_complete(tune_controller, trial, _with_progress(result))

    def _replay(self, tune_controller: Any, trial: Any, saved: SavedTrial) -> None:
        super().on_trial_add(tune_controller, trial)
        self._add_reports(tune_controller, trial, saved)
        super().on_trial_remove(tune_controller, trial)

    def _add_reports(self, tune_controller: Any, trial: Any, saved: SavedTrial) -> None:
        for report in saved.reports:
            if math.isfinite(report.get(self.metric or "", math.nan)):
                super().on_trial_result(tune_controller, trial, _with_progress(report))


def _with_progress(result: dict[str, Any]) -> dict[str, Any]:
    """A result with PROGRESS added if it reports training; a failure or infeasibility has no steps."""
    return {**result, PROGRESS: result["step"] / result["max_steps"]} if "step" in result else result
