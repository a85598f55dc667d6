"""Run the trials: Ray Tune drives them, Optuna proposes them, ASHA stops them early."""

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
from vlmtune.search.requests import Requests
from vlmtune.search.saved_trials import End, SavedTrial, SavedTrials
from vlmtune.search.searcher import TrialSearcher
from vlmtune.search.space import Space
from vlmtune.search.study_file import STUDY_FILE, StudyFile
from vlmtune.search.trial_console import TrialConsole
from vlmtune.search.trial_queue import GridPoints, Proposer, TrialQueue
from vlmtune.search.trial_recorder import SearchStopper, TrialRecorder
from vlmtune.search.trial_runners import TrialRunner
from vlmtune.search.warm_start import EarlierTrials

# CPUs of a trial's driver, which only waits for its workers. With a whole CPU for each driver, none would be
# left for the workers.
TRIAL_CPUS = 0.01
PROGRESS = "progress"  # in a result: the share of its run that a trial has done; ASHA's time attribute
ATTEMPTS = 2  # at the trials whose process died while it was given them
NEVER = 2.0  # ASHA's max_t, at which it stops a trial; PROGRESS never exceeds 1


def run_trials(
    settings: Settings,
    space: Space,
    output_dir: str,
    console: TrialConsole,
    runner: TrialRunner,
    trials: Sequence[SavedTrial] = (),
    earlier: EarlierTrials | None = None,
) -> list[SavedTrial]:
    """Run the trials of a search that have not ended; Tune's own files go to `output_dir`/tune.

    Args:
        trials: those of an interrupted search. Unfinished ones continue from their checkpoints.
        earlier: trials of other searches (`--warm_start`).

    Returns:
        All trials, those of the interrupted search too, in the order of proposal.

    Raises:
        RunStoppedError: the disk failed, or the output folder is gone.
    """
    saved = SavedTrials(output_dir)
    console.open([trial for trial in trials if trial.end is not None])
    for attempt in range(ATTEMPTS):
        proposer: Proposer
        if space.is_grid:
            proposer = GridPoints(grid_points(space))
        else:
            proposer = make_searcher(settings, space, output_dir, earlier)
        queue = TrialQueue(proposer, trials, trial_count(space))
        run_queue(settings, runner, queue, saved, make_scheduler(settings, space, trials), console)
        trials = sorted(queue.trials.values(), key=lambda trial: trial.number)
        lost = [trial for trial in trials if trial.end is End.LOST]
        # Tune restarts a trial whose process died, unless the process died while it was given that trial.
        if not lost or not runner.reuse_actors or attempt == ATTEMPTS - 1:
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
    """Run the trials that a queue still has to give.

    Raises:
        RunStoppedError: the disk failed, or the output folder is gone.
    """
    stopper = SearchStopper(
        settings.search.metric, settings.search.time_budget_s, saved, Requests(saved.folder)
    )
    ended = sum(trial.end is not None for trial in queue.trials.values())
    live = LiveState(saved.folder, objectives_of(settings), ended + queue.left)
    recorder = TrialRecorder(queue, saved, console, stopper, scheduler.stopped, live)
    if queue.left:
        make_tuner(settings, saved.folder, runner, queue, scheduler, recorder, stopper).fit()
    if stopper.budget_spent and stopper.fault is None:
        for trial in queue.trials.values():
            if trial.end is None:  # Tune tells nothing of a trial that it had not started yet
                trial.end = End.BUDGET
                saved.save(trial)
    saved.flush()
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
    """The tuner of a new or a resumed search. What Tune saves of it is not read again."""
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
    """The points of a grid, and the recipe where it is run beside them."""
    recipe = recipe_outside_space(space)
    return [*space.grid(), *([recipe] if recipe is not None else [])]


def make_searcher(
    settings: Settings, space: Space, output_dir: str, earlier: EarlierTrials | None = None
) -> TrialSearcher:
    """Optuna over the space, for one objective or several."""
    search = settings.search
    more_metrics = {name: mode_of(name) for name in search.more_metrics or ()}
    named = settings.model.model_name_or_path is not None
    width = settings.model.ref.config().get_text_config().hidden_size if named else None
    return TrialSearcher(
        space,
        metric=search.metric,
        mode=search.mode,
        seed=settings.training.seed,
        more_metrics=more_metrics,
        width=width,
        earlier=earlier,
        requests=Requests(output_dir),
        study_file=StudyFile(f"{output_dir}/{STUDY_FILE}", [search.metric, *more_metrics]),
    )


def make_scheduler(
    settings: Settings, space: Space, earlier: Sequence[SavedTrial] = ()
) -> "BaselineAwareAsha | NoEarlyStopping":
    """ASHA over the share of its run that a trial has done, or a scheduler that stops nothing.

    The share is the same at the same evaluation of every trial.

    Args:
        earlier: the trials of an interrupted search, whose reports count for ASHA's rungs.
    """
    search = settings.search
    if search.early_stopping == "none":
        return NoEarlyStopping()
    return BaselineAwareAsha(space, search.grace_period, search.reduction_factor, earlier)


class NoEarlyStopping(FIFOScheduler):
    """Tune's first-in-first-out scheduler, with the empty list of trials that it has stopped."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.stopped: set[str] = set()


@dataclass(frozen=True)
class EarlierTrial:
    """A trial of an interrupted search, as ASHA knows a trial."""

    trial_id: str
    config: dict[str, Any]


class BaselineAwareAsha(ASHAScheduler):
    """ASHA that never stops baseline and recipe, because the result of the search is compared with them.

    Args:
        earlier: the trials of an interrupted search. Their reports fill the rungs again.

    Attributes:
        stopped: ids of the trials that it has stopped.
    """

    def __init__(
        self,
        space: Space,
        grace_period: float,
        reduction_factor: int,
        earlier: Sequence[SavedTrial] = (),
    ) -> None:
        # Fractions are fine; Ray's types ask for whole numbers.
        options: Any = {"time_attr": PROGRESS, "grace_period": grace_period, "max_t": NEVER}
        super().__init__(reduction_factor=reduction_factor, **options)
        self.baseline = {**space.baseline, **space.constants}
        self.never_stopped = [self.baseline, recipe_values(space)]
        self.stopped: set[str] = set()
        self._earlier = {trial.trial_id: trial for trial in earlier}

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        # Tune has set the metric by now, and not before.
        for one in [one for one in self._earlier.values() if one.end is not None]:
            del self._earlier[one.trial_id]
            self._replay(tune_controller, EarlierTrial(one.trial_id, {}), one)
        super().on_trial_add(tune_controller, trial)
        earlier = self._earlier.pop(trial.config.get(TRIAL_ID, ""), None)
        if earlier is not None:
            self._add_reports(tune_controller, trial, earlier)

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        decision: str = super().on_trial_result(tune_controller, trial, _with_progress(result))
        if trial_values(trial.config) in self.never_stopped:
            return TrialScheduler.CONTINUE
        if decision == TrialScheduler.STOP:
            self.stopped.add(trial.config[TRIAL_ID])
        return decision

    def on_trial_complete(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> None:
        # NaN would spoil the quantiles that other trials are compared with.
        if math.isfinite(result.get(self.metric or "", math.nan)):
            super().on_trial_complete(tune_controller, trial, _with_progress(result))

    def _replay(self, tune_controller: Any, stand_in: Any, trial: SavedTrial) -> None:
        super().on_trial_add(tune_controller, stand_in)
        self._add_reports(tune_controller, stand_in, trial)
        super().on_trial_remove(tune_controller, stand_in)

    def _add_reports(self, tune_controller: Any, trial: Any, saved: SavedTrial) -> None:
        for report in saved.reports:
            if math.isfinite(report.get(self.metric or "", math.nan)):
                super().on_trial_result(tune_controller, trial, _with_progress(report))


def _with_progress(result: dict[str, Any]) -> dict[str, Any]:
    """A result with PROGRESS added, if it is a report of training."""
    return {**result, PROGRESS: result["step"] / result["max_steps"]} if "step" in result else result
